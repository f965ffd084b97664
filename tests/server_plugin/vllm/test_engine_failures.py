"""What becomes of questions when vLLM's engine dies, and of clients where the plugin is missing.

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
from server_plugin.models import demo_folder
from tests.support.vllm_cpu.environment import Served, collab_serve, vllm_serve
from vlm_collab.errors import CollabError
from vlm_collab.images import Codec, encode

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
    except OSError:  # not ready, or not there
        return False


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def ask_until_refused(
    client: EdgeClient, number: int, answered: asyncio.Event
) -> list[EdgeAnswer | CollabError]:
    """Questions one after the other: whatever happens to the server, some are in flight."""
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
        assert server.started, "\n".join(server.log[-40:])
        assert ready(server)
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
        # vLLM ends its own process then; whoever looks after it starts it anew.
        await asyncio.to_thread(server.process.wait, 90)
        assert time.monotonic() - began < 240
        assert not ready(server)


async def test_without_the_plugin_a_client_is_told() -> None:
    arguments = (str(demo_folder()), "--dtype", "float32", "--block-size", "32", *ENGINE)
    with vllm_serve(*arguments, VLLM_PLUGINS="another") as server:
        assert server.started, "\n".join(server.log[-40:])
        assert not ready(server)
        with pytest.raises(CollabError) as told:
            async with EdgeClient(server.url) as client:
                await client.ask(photo(0), QUESTION, deadline_s=30)
        assert server.url in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.slow
def test_an_engine_that_cannot_give_exact_statistics_does_not_start() -> None:
    options = json.dumps({"vlm_collab": {"preset": "demo", "overrides": {"metric": "entropy"}}})
    arguments = (str(demo_folder()), *ENGINE, "--additional-config", options)
    with vllm_serve(*arguments, VLLM_PLUGINS="vlm_collab") as server:
        assert not server.started
        assert any("start vLLM with --max-logprobs -1" in line for line in server.log)
