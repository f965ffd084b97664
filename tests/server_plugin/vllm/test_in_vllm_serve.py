"""The plugin inside vLLM's server: real processes, real edge clients, the demo model.

Run with `pytest -m vllm tests/server_plugin/vllm`; see `tests/support/vllm_cpu`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from eval.signs.drawing import render
from eval.signs.sampling import generate_scene, questions
from server_plugin.backends.open import open_model
from server_plugin.backends.vllm.capture import HELD
from server_plugin.engines.assembly import engine_of
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from tests.support.vllm_cpu.environment import Served, collab_serve
from vlm_collab.errors import AuthenticationError
from vlm_collab.page import TOKEN_SUBPROTOCOL
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.encoding import decode_down
from vlm_collab.protocol.encoding import encode as to_wire
from vlm_collab.protocol.messages import SUBPROTOCOL, VERSION, Hello, Options, Welcome

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("served")]

KEY = "a-key-for-tests"
ENGINE = (
    *("--enforce-eager", "--max-model-len", "512", "--num-gpu-blocks-override", "128"),
    *("--limit-mm-per-prompt", '{"image": 3}'),
)
COUNT = 8
COUNT_OF_TWO = 4
BLOCK = 32


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """`vlm-collab serve demo --backend vllm`, which asks for a region every time.

    It keeps few views and blocks, so that their memory is soon full and its growth is not taken for
    a leak. vLLM's development endpoints report what the plugin holds in the workers.
    """
    ours = ("demo", "--policy", "always", "--view-memory-mb", "4")
    variables = {"VLM_COLLAB_TOKEN": KEY, "VLLM_SERVER_DEV_MODE": "1"}
    with collab_serve(*ours, *ENGINE, **variables) as server:
        assert server.started, "\n".join(server.log[-40:])
        yield server


@pytest.fixture
def server(served: Served) -> int:
    return served.port


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
def pictures_and_questions() -> list[tuple[bytes, str]]:
    scenes = [generate_scene("test", number) for number in range(COUNT)]
    return [(encode(render(scene), Codec.PNG, 90), questions(scene)[0].text) for scene in scenes]


async def ask_all(url: str, token: str | None) -> list[EdgeAnswer]:
    """Plain questions, and conversations about two pictures."""
    options = Options(tokens=True, stop=("7",))
    pairs = list(itertools.pairwise(pictures_and_questions()))[:COUNT_OF_TWO]
    async with EdgeClient(url, token=token) as client:
        return await asyncio.gather(
            *(
                client.ask(picture, question, deadline_s=300)
                for picture, question in pictures_and_questions()
            ),
            *(
                client.ask(
                    [one, two],
                    question,
                    history=[(before, "12")],
                    options=options,
                    deadline_s=300,
                )
                for (one, before), (two, question) in pairs
            ),
        )


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
        fields = ("text", "stage", "fallback", "first_text", "box", "view_bytes", "picture")
        for field in (*fields, "finish"):
            assert getattr(got, field) == getattr(wanted, field)
        assert [token.text for token in got.tokens] == [token.text for token in wanted.tokens]
        for token, same in zip(got.tokens, wanted.tokens, strict=True):
            assert token.surprisal_micro == pytest.approx(same.surprisal_micro, abs=100)
        assert got.uncertainty == pytest.approx(wanted.uncertainty, abs=1e-4)
        assert got.first_uncertainty == pytest.approx(wanted.first_uncertainty, abs=1e-4)
    assert len({answer.box for answer in answers}) > 1
    assert all(answer.refined for answer in answers)
    assert all(answer.tokens for answer in answers[COUNT:])


async def test_the_key_guards_our_routes(server: int) -> None:
    for token in (None, "another"):
        with pytest.raises(AuthenticationError):
            async with EdgeClient(f"ws://127.0.0.1:{server}", token=token):
                pass
    for path in ("/v1/collab/readyz", "/v1/collab/metrics", "/v1/collab/healthz"):
        assert get(server, path, key=None)[0] == 401
        assert get(server, path)[0] == 200
    assert json.loads(get(server, "/v1/collab/readyz")[1])["ready"] is True


async def test_the_page_loads_without_the_key_and_asks_with_it(server: int) -> None:
    """A browser cannot send a key in a header for a page or a WebSocket; it uses a subprotocol."""
    assert "<html" in get(server, "/collab/", key=None)[1]
    assert get(server, "/collab/page/main.js", key=None)[0] == 200
    assert get(server, "/collab/page/access", key=None, body={})[0] == 401
    assert get(server, "/collab/page/access", body={})[0] == 204
    assert get(server, "/collab/metrics", key=None)[0] == 401

    def offered(key: str) -> str:
        return TOKEN_SUBPROTOCOL + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")

    # For any host name in the Host header.
    url = "ws://vlm.example.org/collab/v1/collab"
    page_origin = "https://vlm.example.org"
    for protocols, origin, status in (
        ([SUBPROTOCOL, offered(KEY)], page_origin, None),
        ([SUBPROTOCOL, offered(KEY)], "https://evil.example", 403),
        ([SUBPROTOCOL, offered("another")], page_origin, 401),
        ([SUBPROTOCOL], page_origin, 401),
    ):
        dialled = connect(url, host="127.0.0.1", port=server, subprotocols=protocols, origin=origin)
        try:
            async with dialled as socket:
                await socket.send(to_wire(Hello(VERSION, (Codec.JPEG,))))
                assert isinstance(decode_down(await socket.recv()), Welcome)
            refused = None
        except InvalidStatus as error:
            refused = error.response.status_code
        assert refused == status, (protocols, origin)


async def test_what_is_sent_is_not_compressed(server: int) -> None:
    """Pictures do not shrink, and the bytes that are counted are those that are sent."""
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"ws://127.0.0.1:{server}/v1/collab"
    async with connect(url, subprotocols=[SUBPROTOCOL], additional_headers=headers) as socket:
        assert "permessage-deflate" in socket.request.headers["Sec-WebSocket-Extensions"]
        assert socket.protocol.extensions == []


def test_vllm_s_own_endpoints_work_beside_it(server: int) -> None:
    body = {"model": "demo", "prompt": "USER: hello ASSISTANT:", "max_tokens": 3}
    status, text = get(server, "/v1/completions", body=body)
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] >= 1
    # No request for rows through vLLM's own endpoints ends the engine.
    extra = {"vlm_collab_key": "x", "vlm_collab_first": 0, "vlm_collab_stop": 10**9}
    assert get(server, "/v1/completions", body={**body, "vllm_xargs": extra})[0] == 200
    extra["vlm_collab_stop"] = 2
    before = held(server)
    for number in range(3):
        extra["vlm_collab_key"] = str(number)
        assert get(server, "/v1/completions", body={**body, "vllm_xargs": extra})[0] == 200
    assert held(server) == before, "others have no rows kept, which could push ours out"
    assert get(server, "/v1/completions", body=body)[0] == 200


async def test_a_view_is_computed_once_for_all_its_questions(server: int) -> None:
    """Requests, cached tokens and pictures that were processed, as vLLM itself counts them."""
    picture, question = pictures_and_questions()[0]
    source = Picture.open(picture)
    async with EdgeClient(f"ws://127.0.0.1:{server}", token=KEY) as client:
        before = counted(server)
        first = await client.ask(source, question, deadline_s=120)
        between = counted(server)
        second = await client.ask(source, "is there a red sign?", deadline_s=120)
        after = counted(server)
    assert first.refined
    assert second.refined
    assert between["requests"] - before["requests"] == 3, "first pass, generic row, second pass"
    assert after["requests"] - between["requests"] == 2, "the generic row is there already"
    # The view's 64 tokens are two whole blocks. The generic instruction and every later pass take
    # them from the cache; so does the first one, if another test has shown this picture already.
    assert between["hits"] - before["hits"] >= 2 * 2 * BLOCK
    assert after["hits"] - between["hits"] >= 2 * 2 * BLOCK
    assert second.usage.prefilled_tokens < first.usage.prefilled_tokens
    # Each pass names its pictures, two in the second one. Only what is new is processed: of the
    # first question the view and its region, of the second another region at most.
    assert between["pictures"] - before["pictures"] == 4
    assert after["pictures"] - between["pictures"] == 3
    assert between["known pictures"] - before["known pictures"] >= 2
    assert after["known pictures"] - between["known pictures"] >= 2


def held(server: int) -> dict[str, int]:
    """Return the counts of what the plugin keeps in the worker."""
    (of_worker,) = json.loads(get(server, "/collective_rpc", KEY, {"method": HELD})[1])["results"]
    assert isinstance(of_worker, dict)
    return of_worker


def counted(server: int) -> dict[str, float]:
    text = get(server, "/metrics")[1]

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.M)))

    return {
        "requests": total("request_success"),
        "hits": total("prefix_cache_hits"),
        "pictures": total("mm_cache_queries"),
        "known pictures": total("mm_cache_hits"),
    }


async def test_dropped_connections_leave_nothing_behind(served: Served) -> None:
    """200 connections dropped at every stage leave no request, no row, no memory."""
    for _ in range(5):
        await come_and_go(served.url, 200)
    await ask_all(served.url, KEY)
    warm = served.memory_bytes()
    await come_and_go(served.url, 200)
    # These answers come after all of them in the engine's queue.
    await ask_all(served.url, KEY)
    status, text = await asyncio.to_thread(get, served.port, "/metrics")
    assert status == 200
    for name in ("running", "waiting"):
        (value,) = re.findall(rf"^vllm:num_requests_{name}\{{.*\}} (\S+)$", text, re.M)
        assert float(value) == 0, f"requests {name}"
    status, text = await asyncio.to_thread(get, served.port, "/v1/collab/metrics")
    for name in ("questions_in_flight", "queue_depth", "connections"):
        (value,) = re.findall(rf"^vlm_collab_{name}\S* (\S+)$", text, re.M)
        assert float(value) == 0, name
    # Rows of dropped questions are fetched with the others.
    assert await asyncio.to_thread(held, served.port) == {"pending": 0, "rows": 0}
    assert list(warm) == [served.process.pid, *served.children()], "the same processes"
    grown = {pid: now - warm[pid] for pid, now in served.memory_bytes().items()}
    front_end, *others = grown.values()
    # 200 views have 8 MB; their original pictures have 480 MB.
    assert front_end < 4e6, grown
    # The worker's memory also depends on the largest step.
    assert sum(others) < 32e6, grown


async def come_and_go(url: str, count: int) -> None:
    pairs = pictures_and_questions()

    async def leave(number: int) -> None:
        picture, question = pairs[number % COUNT]
        async with EdgeClient(url, token=KEY) as client:
            task = asyncio.create_task(client.ask(picture, question, deadline_s=300))
            await asyncio.wait([task], timeout=0.02 * (number % 10))
            task.cancel()

    await asyncio.gather(*(leave(number) for number in range(count)))
