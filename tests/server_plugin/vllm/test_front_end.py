"""The vLLM plugin's front-end, without vLLM: fetching rows, and checks before the start."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.backends.open import demo_folder
from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.client import MOST_WAITING, RowClient
from server_plugin.backends.vllm.model import check, weightless_adapter
from server_plugin.models.presets import preset_named
from server_plugin.service.config import ServiceLimits
from server_plugin.service.runner import running
from server_plugin.vllm_server.endpoint import CollabEndpoint, finish_before_shutdown, options_of
from tests.support.raw import SMALL, request, serving, until
from tests.support.tiny_llava import rename_family, save_tiny_llava
from tests.support.wire import SURE, edge, picture, service, unsure
from vlm_collab.errors import ConfigError, ErrorCode, ModelError
from vlm_collab.protocol.messages import Fallback, Stage
from vlm_collab.protocol.server_session import ServerLimits

SCOPE = "a secret "


class Workers:
    """Two ranks of two heads each; a row's key names its content."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.heads: list[dict[str, Any]] = [{"heads": 2}, {"heads": 2}]

    async def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if method == capture.INSTALL:
            return self.heads
        one = [None if key == "lost" else (row(float(key)).tobytes(), 2) for key in arguments[0]]
        return [one, one]

    @property
    def taken(self) -> list[list[str]]:
        """The keys of each call for rows."""
        return [call[1] for call in self.calls if call[0] == capture.TAKE]


def row(value: float) -> np.ndarray:
    return np.array([2 * value, 4 * value], np.float32)


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def client(workers: Workers) -> RowClient:
    return RowClient(workers.call, 1, 4, SCOPE)


async def test_rows_requested_during_a_call_share_the_next_call(
    workers: Workers, client: RowClient
) -> None:
    workers.gate.clear()
    first = asyncio.create_task(client.expect("1").fetch())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(client.expect(str(n)).fetch()) for n in (2, 3, 4)]
    await asyncio.sleep(0)
    workers.gate.set()
    rows = await asyncio.gather(first, *others)
    assert workers.taken == [["1"], ["2", "3", "4"]]
    for number, got in enumerate(rows, 1):
        np.testing.assert_array_equal(got, [number, 2 * number])
    np.testing.assert_array_equal(await client.expect("5").fetch(), [5, 10])


async def test_one_call_fetches_all_captured_rows(workers: Workers, client: RowClient) -> None:
    one, two, three = (client.expect(str(number)) for number in (1, 2, 3))
    await asyncio.sleep(0)
    assert workers.calls == []
    np.testing.assert_array_equal(await two.fetch(), [2, 4])
    np.testing.assert_array_equal(await one.fetch(), [1, 2])
    assert workers.taken == [["1", "2", "3"]]
    np.testing.assert_array_equal(await three.fetch(), [3, 6])
    np.testing.assert_array_equal(await three.fetch(), [3, 6])
    assert len(workers.taken) == 1
    client.expect("4")
    # A row that nobody needs is fetched too, so that no worker keeps it.
    np.testing.assert_array_equal(await client.expect("5").fetch(), [5, 10])
    assert workers.taken[-1] == ["4", "5"]


async def test_unneeded_rows_are_fetched_before_they_are_many(
    workers: Workers, client: RowClient
) -> None:
    for number in range(MOST_WAITING - 1):
        client.expect(str(number))
    await asyncio.sleep(0)
    assert workers.taken == []
    client.expect("1000")
    await asyncio.sleep(0)
    assert [len(keys) for keys in workers.taken] == [MOST_WAITING]


async def test_a_missing_row_is_an_error_for_that_row_only(
    client: RowClient,
) -> None:
    expected = [client.expect(key).fetch() for key in ("1", "lost", "2")]
    results = await asyncio.gather(*expected, return_exceptions=True)
    assert isinstance(results[1], ModelError)
    np.testing.assert_array_equal(results[0], [1, 2])
    np.testing.assert_array_equal(results[2], [2, 4])


async def test_a_failed_call_fails_only_the_rows_that_wait_for_it(
    workers: Workers, client: RowClient
) -> None:
    workers.failure = RuntimeError("the engine\nis gone")
    with pytest.raises(ModelError, match="the engine is gone"):
        await client.expect("1").fetch()
    workers.failure = None
    np.testing.assert_array_equal(await client.expect("2").fetch(), [2, 4])


async def test_a_cancelled_fetch_does_not_disturb_the_others(
    workers: Workers, client: RowClient
) -> None:
    workers.gate.clear()
    rows = [client.expect(str(n)) for n in (1, 2)]
    tasks = [asyncio.create_task(one.fetch()) for one in rows]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    workers.gate.set()
    np.testing.assert_array_equal(await tasks[1], [2, 4])
    assert tasks[0].cancelled()
    np.testing.assert_array_equal(await rows[0].fetch(), [1, 2])


@pytest.mark.parametrize(
    ("heads", "line"),
    [
        ([{"heads": 2}, {"error": "vLLM 9.9 cannot give attention rows here: x"}], "vLLM 9.9"),
        ([{"heads": 2}], "have 2 attention heads of layer 1, the checkpoint 4"),
    ],
)
async def test_workers_that_cannot_serve_rows_end_the_start(
    heads: list[dict[str, Any]], line: str, workers: Workers, client: RowClient
) -> None:
    workers.heads = heads
    with pytest.raises(ConfigError, match=line):
        await client.install()


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        # The message of vLLM 0.32.
        (
            "Call to collective_rpc method failed: Worker failed with error 'Method "
            "'vlm_collab_install' is not implemented.', please check the stack trace above",
            "do not know the plugin .* VLLM_PLUGINS",
        ),
        ("RPC call to\ncheck timed out", "did not reply: RPC call to check timed out"),
    ],
)
async def test_a_call_that_fails_ends_the_start_and_says_why(
    failure: str, line: str, workers: Workers, client: RowClient
) -> None:
    workers.failure = RuntimeError(failure)
    with pytest.raises(ConfigError, match=line):
        await client.install()


async def test_installation_happens_once(workers: Workers, client: RowClient) -> None:
    await asyncio.gather(client.install(), client.install())
    assert workers.calls == [(capture.INSTALL, 1, SCOPE)]


def test_what_vllm_does_not_serve_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "tiny")
    demo = preset_named("demo")
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        check(str(folder), demo.with_overrides(layer=9), "tiny")
    with pytest.raises(ConfigError, match=r"family 'qwen2\.5-vl', but tiny is of 'llava'"):
        check(str(folder), preset_named("qwen2.5-vl"), "tiny")
    rename_family(folder, "instructblip")
    with pytest.raises(ConfigError, match="does not serve instructblip; use --backend transf"):
        check(str(folder), demo, "tiny")


def test_an_adapter_without_weights_makes_prompts_of_the_engine_s_context() -> None:
    preset = preset_named("demo")
    source = str(demo_folder())
    adapter = weightless_adapter(check(source, preset, "demo"), source, preset, 300)
    assert adapter.layout.context_tokens == 300
    prompt = adapter.prompts.build(GenerationRequest("what is on the sign?", max_new_tokens=16), 2)
    assert [len(place) for place in prompt.images] == [64, 64]
    assert adapter.end_tokens == {2}
    assert adapter.text_of([*prompt.ids[-3:], 2]).endswith("ASSISTANT:")


@pytest.mark.parametrize(
    "given", [{"presets": "demo"}, {"preset": 3}, {"origins": "everyone"}, {"overrides": []}]
)
def test_a_misspelled_option_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--additional-config"):
        options_of({"vlm_collab": given})


async def test_a_client_that_does_not_read_is_dropped() -> None:
    """By uvicorn as vLLM runs it, with its server in the application's state."""
    endpoint = CollabEndpoint()

    async def refuse_to_wait(websocket: WebSocket) -> None:
        await websocket.accept()
        endpoint.drop(websocket)
        await websocket.receive()

    app = Starlette(routes=[WebSocketRoute("/", refuse_to_wait)])
    app.state.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    endpoint.attach_router(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(app.state.server.serve(sockets=[listening]))
        async with connect(f"ws://127.0.0.1:{listening.getsockname()[1]}") as client:
            with pytest.raises(ConnectionClosedError) as closed:
                await asyncio.wait_for(client.recv(), 30)
        assert closed.value.rcvd is None, (
            "no farewell, which a client that does not read never sees"
        )
        app.state.server.should_exit = True
        await serving


async def test_vllm_s_server_drops_clients_that_do_not_read() -> None:
    """Connections to vLLM's own endpoints count too: one server has them all."""
    endpoint = CollabEndpoint()
    endpoint._limits = ServiceLimits(write_timeout_s=0.4)
    app = Starlette(routes=[Route("/v1/models", lambda _: Response(bytes(2**17)))])
    app.state.server = server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    endpoint.attach_router(app)
    sock = socket.create_server(("127.0.0.1", 0))
    async with serving(server, sock, "", SMALL) as running_server:
        client = running_server.open(buffer=SMALL)
        await client.send(request("/v1/models"))
        await until(lambda: running_server.waiting() > 0)
        await until(lambda: not running_server.connections)


async def test_connections_to_vllm_s_server_from_one_address_are_bounded_if_asked_for() -> None:
    for most, status in ((1, b" 503 "), (None, b" 200 ")):
        endpoint = CollabEndpoint()
        endpoint._limits = ServiceLimits(max_per_address=most)
        routes = [
            Route("/v1/models", lambda _: Response(bytes(2**17))),
            Route("/collab/healthz", lambda _: Response(b"ok")),
        ]
        app = Starlette(routes=routes)
        app.state.server = server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        endpoint.attach_router(app)
        sock = socket.create_server(("127.0.0.1", 0))
        async with serving(server, sock, "", SMALL) as running_server:
            await running_server.open(buffer=SMALL).send(request("/v1/models"))
            await until(lambda running_server=running_server: running_server.waiting() > 0)
            assert status in await running_server.open().get("/v1/models")
            assert b" 200 " in await running_server.open().get("/collab/healthz")


async def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    endpoint, seen = CollabEndpoint(), []

    async def take(websocket: WebSocket) -> None:
        await websocket.accept()
        while (message := await websocket.receive())["type"] == "websocket.receive":
            seen.append(len(message["bytes"]))
            await websocket.send_bytes(b"taken")

    app = Starlette(routes=[WebSocketRoute("/", take)])
    app.state.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    endpoint.attach_router(app)
    limit = ServerLimits().max_frame_bytes
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(app.state.server.serve(sockets=[listening]))
        async with connect(f"ws://127.0.0.1:{listening.getsockname()[1]}") as client:
            await client.send(b"x" * limit)
            assert await asyncio.wait_for(client.recv(), 30) == b"taken"
            await client.send(b"x" * (limit + 1))
            with pytest.raises(ConnectionClosedError) as closed:
                await asyncio.wait_for(client.recv(), 30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009  # message too big
        assert seen == [limit]
        app.state.server.should_exit = True
        await serving


async def test_a_refusal_at_start_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={}, model_config=SimpleNamespace(model="some/model")
        )
    )
    with pytest.raises(SystemExit) as ended:
        await CollabEndpoint().init_state(engine, None, SimpleNamespace(revision="v2"))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlm-collab: --revision: ")


class StoppingEngine:
    """An engine client that records its shutdown."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)


async def test_questions_end_before_their_engine_does() -> None:
    """vLLM shuts its engine down in a thread, and at its end again in the event loop's thread."""
    waiting_service = service(FakeBackend(play=lambda *_: Script("one", "two", 2.0, delay_s=0.3)))
    engine, loop = StoppingEngine(), asyncio.get_running_loop()
    finish_before_shutdown(engine, waiting_service)
    async with running(waiting_service) as url, edge(url) as client:
        id = await unsure(client)
        stopping = loop.run_in_executor(None, partial(engine.shutdown, timeout=30))
        while not waiting_service.state.draining:
            await asyncio.sleep(0.001)
        await client.ask(SURE)
        assert (await client.next()).code is ErrorCode.SHUTTING_DOWN
        assert engine.timeouts == []
        await client.region(id, picture())
        answer = await client.next()
        assert (answer.text, answer.stage) == ("two", Stage.SECOND)
        await stopping
        (left,) = engine.timeouts
        assert left is not None
        assert 25 < left < 30, "what was waited counts"
    engine.shutdown(timeout=30)
    assert engine.timeouts[1:] == [30]


async def test_without_a_timeout_questions_end_at_once_with_a_reason() -> None:
    waiting_service = service(FakeBackend(play=lambda *_: Script("one", "two", 2.0)))
    engine, loop = StoppingEngine(), asyncio.get_running_loop()
    finish_before_shutdown(engine, waiting_service)
    async with running(waiting_service) as url, edge(url) as client:
        await unsure(client)
        stopping = loop.run_in_executor(None, partial(engine.shutdown, timeout=0))
        answer = await client.next()
        assert (answer.text, answer.fallback) == ("one", Fallback.OVERLOAD)
        await asyncio.wait_for(stopping, 20)
    assert engine.timeouts == [0]


async def test_an_engine_that_ended_by_itself_is_not_waited_for() -> None:
    """vLLM then cleans up in the event loop's thread, where waiting for the loop never ends."""
    engine, waiting_service = StoppingEngine(), service()
    finish_before_shutdown(engine, waiting_service)
    engine.shutdown()
    assert engine.timeouts == [None]
    assert not waiting_service.state.draining


def test_options_of_other_plugins_are_ignored() -> None:
    assert options_of({"other": 1}).preset is None
    assert options_of({"vlm_collab": {"preset": "demo"}}).preset == "demo"
