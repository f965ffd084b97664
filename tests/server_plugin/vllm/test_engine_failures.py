"""Questions when vLLM stops or its engine dies, and clients when the plugin is missing or refuses.

Each test starts a server of its own. Run with `pytest -m vllm tests/server_plugin/vllm`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from server_plugin.backends.open import demo_folder
from server_plugin.service.config import ENDPOINT
from tests.support.vllm_cpu.environment import Served, collab_serve, vllm_serve
from tests.support.wire import edge, picture
from vlm_collab.errors import CollabError, ErrorCode
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.edge_session import RegionWanted
from vlm_collab.protocol.messages import Answer, Error, Fallback, Options, Retransmit, Stage

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("failures")]

ENGINE = ("--enforce-eager", "--max-model-len", "512")
QUESTION = "what is written on the large red sign?"


def photo(number: int) -> bytes:
    noise = Image.effect_noise((700 + number, 600), 60).convert("RGB")
    return encode(noise, Codec.JPEG, 90)


def ready(server: Served) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/collab/readyz", timeout=20):
            return True
    except OSError:  # not ready, or not listening
        return False


async def become_ready(server: Served) -> None:
    """Wait until the server accepts connections, shortly after it reports that it has started."""
    assert server.started, "\n".join(server.log[-40:])
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(ready, server):
            await asyncio.sleep(0.05)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def ask_until_refused(
    client: EdgeClient, number: int, answered: asyncio.Event
) -> list[EdgeAnswer | CollabError]:
    """Ask questions one after the other, so that some are always in progress."""
    outcomes: list[EdgeAnswer | CollabError] = []
    while True:
        try:
            outcomes.append(await client.ask(photo(number), QUESTION, deadline_s=60))
            answered.set()
        except CollabError as error:
            return [*outcomes, error]


@pytest.mark.parametrize(
    "victim", ["VLLM::Worker", pytest.param("VLLM::EngineCore", marks=pytest.mark.slow)]
)
async def test_no_question_is_lost_when_a_process_of_the_engine_is_killed(victim: str) -> None:
    with collab_serve("demo", "--policy", "always", *ENGINE) as server:
        await become_ready(server)
        children = server.children()
        (killed,) = (pid for pid in children if name_of(pid).startswith(victim))
        async with EdgeClient(server.url) as client:
            answered = asyncio.Event()
            tasks = [
                asyncio.create_task(ask_until_refused(client, number, answered))
                for number in range(8)
            ]
            await asyncio.wait_for(answered.wait(), timeout=120)
            os.kill(killed, signal.SIGKILL)
            began = time.monotonic()
            ended = await asyncio.wait_for(asyncio.gather(*tasks), timeout=180)
        outcomes = [outcome for each in ended for outcome in each]
        assert any(isinstance(outcome, EdgeAnswer) for outcome in outcomes)
        refused = [outcome for outcome in outcomes if isinstance(outcome, CollabError)]
        assert len(refused) == len(tasks)
        assert all(map(str, refused))
        # vLLM then ends its own process, unless it is set to stay; a supervisor restarts it.
        await asyncio.to_thread(server.process.wait, 90)
        assert time.monotonic() - began < 240
        assert not ready(server)


async def test_a_server_that_is_stopped_finishes_what_is_in_flight() -> None:
    """Within `--shutdown-timeout`, during which a question can still need further passes."""
    stop = ("--shutdown-timeout", "60")
    with collab_serve("demo", "--policy", "always", *ENGINE, *stop) as server:
        await become_ready(server)
        async with edge(server.url + ENDPOINT) as client:
            for number in range(1, 9):
                await client.ask(QUESTION, picture(number), view_id=number)
            for _ in range(8):
                assert isinstance(await client.next(), RegionWanted)
            # These questions are being sent, or in their first pass.
            for number in range(9, 13):
                await client.ask(QUESTION, picture(number), view_id=number)
            server.process.send_signal(signal.SIGTERM)
            while "stopping engine client" not in "\n".join(server.log):
                await asyncio.sleep(0.01)
            assert not await asyncio.to_thread(ready, server)
            late = await client.ask(QUESTION, picture(99), view_id=99)
            for number in range(1, 9):
                await client.region(number, picture(50 + number))
            ended: dict[int, Answer | Error] = {}
            while len(ended) < 13:
                event = await client.next()
                if isinstance(event, RegionWanted):
                    await client.region(event.id, picture(70))
                else:
                    ended[event.id] = event
        refused = ended.pop(late)
        assert isinstance(refused, Error)
        assert refused.code is ErrorCode.SHUTTING_DOWN
        for number, event in ended.items():
            if number > 8 and isinstance(event, Error):
                assert event.code is ErrorCode.SHUTTING_DOWN
                continue
            assert isinstance(event, Answer)
            assert (event.stage, event.fallback) == (Stage.SECOND, Fallback.NONE)
        await asyncio.to_thread(server.process.wait, 60)


@pytest.mark.slow
async def test_a_server_whose_engine_is_dead_is_not_ready() -> None:
    """If vLLM is set to stay, only the service can report the dead engine."""
    variables = {"VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}
    with collab_serve("demo", "--policy", "always", *ENGINE, **variables) as server:
        await become_ready(server)
        (worker,) = (pid for pid in server.children() if name_of(pid).startswith("VLLM::Worker"))
        async with edge(server.url + ENDPOINT) as client:
            await client.ask(QUESTION, picture(), options=Options(retransmit=Retransmit.NEVER))
            assert isinstance(await client.next(), Answer)
            os.kill(worker, signal.SIGKILL)
            async with asyncio.timeout(60):
                while await asyncio.to_thread(ready, server):
                    await asyncio.sleep(0.1)
            await client.ask(QUESTION)
            refused = await client.next()
            assert refused.code is ErrorCode.SHUTTING_DOWN
            assert "the model has failed" in refused.text
        with pytest.raises(CollabError, match="HTTP 503"):
            async with EdgeClient(server.url):
                pass
        assert server.process.poll() is None


@pytest.mark.slow
async def test_without_the_plugin_a_client_gets_a_clear_error() -> None:
    arguments = (str(demo_folder()), "--dtype", "float32", "--block-size", "32", *ENGINE)
    with vllm_serve(*arguments, VLLM_PLUGINS="another") as server:
        assert server.started, "\n".join(server.log[-40:])
        assert not ready(server)
        with pytest.raises(CollabError) as reported:
            async with EdgeClient(server.url) as client:
                await client.ask(photo(0), QUESTION, deadline_s=30)
        assert server.url in str(reported.value)
        assert "\n" not in str(reported.value)


@pytest.mark.slow
def test_an_engine_that_cannot_give_exact_statistics_does_not_start() -> None:
    """Errors that only the running engine reveals are one line, without a traceback."""
    options = json.dumps({"vlm_collab": {"preset": "demo", "overrides": {"metric": "entropy"}}})
    arguments = (str(demo_folder()), *ENGINE, "--additional-config", options)
    with vllm_serve(*arguments, VLLM_PLUGINS="vlm_collab") as server:
        assert not server.started
        assert server.process.wait(60) == 1
        reported = [line for line in server.log if "vlm-collab: the metric entropy" in line]
        assert len(reported) == 1, "\n".join(server.log[-40:])
        assert "start vLLM with --max-logprobs -1" in reported[0]
        assert not any("Traceback" in line for line in server.log), "\n".join(server.log[-40:])
        assert not server.children()
