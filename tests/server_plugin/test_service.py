"""The service over real WebSockets: answers, refusals, and no question lost."""

from __future__ import annotations

import itertools
import struct
import zlib

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.service.runner import running
from tests.support.wire import SURE, UNSURE, edge, http, picture, service, settled, unsure
from vlm_collab.errors import ErrorCode, LocalProtocolError, ModelError
from vlm_collab.method.policy import Aggregate, Metric, NeverPolicy, RandomPolicy, ThresholdPolicy
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import RegionWanted
from vlm_collab.protocol.encoding import decode_down, encode
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Error,
    Fallback,
    Finish,
    Hello,
    MoreView,
    Options,
    Retransmit,
    Stage,
    Turn,
)
from vlm_collab.protocol.server_session import ServerLimits

# ---- the two stages --------------------------------------------------------------------------


async def test_sure_and_unsure_questions_on_one_view():
    backend = FakeBackend()
    async with running(service(backend)) as url, edge(url) as client:
        await client.ask(SURE, picture(1))
        sure = await client.next()
        assert (sure.stage, sure.fallback) == (Stage.FIRST, Fallback.NONE)
        for _ in range(2):
            id = await client.ask(UNSURE)  # no pixels: the view is referred to
            wanted = await client.next()
            assert wanted.request.first.endswith(UNSURE)
            await client.region(id, picture(2))
            refined = await client.next()
            assert refined.stage is Stage.SECOND
            assert refined.text.startswith("second")
            assert refined.usage.prefilled_tokens > 0
        assert backend.generic_rows == 1
    assert backend.views == set()


async def test_streamed_texts_grow_to_the_answers():
    async with running(service()) as url, edge(url) as client:
        id = await client.ask(UNSURE, picture(), options=Options(stream=True))
        texts = {Stage.FIRST: [""], Stage.SECOND: [""]}
        while not isinstance(event := await client.next(), Answer):
            if isinstance(event, RegionWanted):
                await client.region(id, picture(5))
            else:
                texts[event.stage].append(event.text)
        # A text is skipped when a newer one is there, so only growth is certain.
        for stage in texts.values():
            assert all(later.startswith(text) for text, later in itertools.pairwise(stage))
        assert event.text.startswith(texts[Stage.SECOND][-1])


async def test_a_conversation_about_several_pictures():
    backend = FakeBackend()
    async with running(service(backend)) as url, edge(url) as client:
        more = (MoreView(picture(2), 896, 896), MoreView(picture(3), 448, 448))
        history = (Turn("who?", "me"),)
        await client.ask("what is small?", picture(1), history=history, more=more)
        wanted = await client.next()
        assert wanted.request.picture == 2
        # The box is of the third picture, which is half as large as the others.
        assert max(wanted.box.right, wanted.box.bottom) <= 448
        assert wanted.request.first.endswith("who? me what is small?")
        id = wanted.request.id
        await client.region(id, picture(4))
        assert (await client.next()).stage is Stage.SECOND
        # A follow-up refers to all three views by one number.
        again = tuple(MoreView(None, one.source_width, one.source_height) for one in more)
        await client.ask(SURE, more=again)
        assert (await client.next()).stage is Stage.FIRST
        assert len(backend.views) == 1


async def test_views_that_do_not_fit_together_are_refused():
    async with running(service()) as url, edge(url) as client:
        await client.ask(SURE, picture(1), more=(MoreView(None, 9, 9),))
        assert (await client.next()).code is ErrorCode.BAD_IMAGE
        await client.ask(SURE, picture(1), view_id=2)
        assert isinstance(await client.next(), Answer)
        # One picture is held under this number, not two.
        await client.ask(SURE, view_id=2, more=(MoreView(None, 9, 9),))
        assert (await client.next()).code is ErrorCode.VIEW_GONE
        await client.ask(SURE, picture(1), view_id=3, more=(MoreView(picture(2, (9, 9)), 9, 9),))
        assert (await client.next()).code is ErrorCode.BAD_IMAGE


async def test_stop_texts_and_tokens_over_the_wire():
    async with running(service()) as url, edge(url) as client:
        options = Options(stop=(" sky",), tokens=True)
        await client.ask(SURE, picture(), options=options)
        answer = await client.next()
        assert answer.text.endswith("what colour is the")
        assert answer.finish is Finish.STOP
        assert "".join(token.text for token in answer.tokens) == answer.text
        await client.ask(SURE, options=Options(max_new_tokens=2))
        answer = await client.next()
        assert (answer.finish, answer.tokens) == (Finish.LENGTH, ())


async def test_the_server_announces_its_features():
    async with running(service()) as url, edge(url) as client:
        assert set(client.session.welcome.features) >= {"history", "pictures", "sampling", "stop"}


async def test_a_conversation_counts_towards_the_limit_of_a_question():
    limits = {"connection": ServerLimits(max_question_bytes=100)}
    async with running(service(limits=limits)) as url, edge(url) as client:
        with pytest.raises(LocalProtocolError, match="history"):
            await client.ask(SURE, picture(), history=(Turn("a" * 50, "b" * 50),))
        rude = Ask(1, SURE, 1, picture(), 9, 9, None, (Turn("a" * 50, "b" * 50),))
        await client.websocket.send(encode(rude))
        error = decode_down(await client.websocket.recv())
        assert error.code is ErrorCode.TOO_LARGE


async def test_the_map_is_sent_when_requested():
    async with running(service()) as url, edge(url) as client:
        await client.ask(UNSURE, picture(), options=Options(want_map=True))
        wanted = await client.next()
        assert len(wanted.request.map) == 64
        assert max(wanted.request.map) == 255
        await client.ask(UNSURE)
        assert (await client.next()).request.map == b""


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (Options(retransmit=Retransmit.NEVER), Stage.FIRST),
        (Options(eta=3.0), Stage.FIRST),
        (Options(eta=1.9), Stage.SECOND),
    ],
)
async def test_options_of_a_question_change_the_decision(options, stage):
    async with running(service()) as url, edge(url) as client:
        id = await client.ask(UNSURE, picture(), options=options)
        event = await client.next()
        if isinstance(event, RegionWanted):
            await client.region(id, picture(7))
            event = await client.next()
        assert event.stage is stage


# ---- the second stage fails ------------------------------------------------------------------


@pytest.mark.parametrize(
    "region",
    [
        b"",
        b"no picture",
        picture(1)[:60],
        picture(1, size=(113, 112)),
        picture(1, size=(1, 113)),  # few pixels, and still longer than what was asked for
        picture(1, codec=Codec.WEBP)[:-8],
    ],
)
async def test_a_bad_region_leaves_the_first_answer(region):
    async with running(service()) as url, edge(url) as client:
        id = await unsure(client)
        await client.region(id, region)
        answer = await client.next()
        assert (answer.stage, answer.fallback) == (Stage.FIRST, Fallback.BAD_REGION)
        assert answer.text.startswith("first")


async def test_a_region_that_does_not_come_leaves_the_first_answer():
    async with running(service(limits={"region_deadline_s": 0.1})) as url, edge(url) as client:
        id = await unsure(client)
        answer = await client.next()
        assert (answer.id, answer.fallback) == (id, Fallback.DEADLINE)


async def test_a_failing_second_pass_leaves_the_first_answer(caplog):
    backend = FakeBackend(play=lambda *_: Script("one", "two", 2.0, fail_second=True))
    async with running(service(backend)) as url, edge(url) as client:
        id = await unsure(client)
        await client.region(id, picture())
        answer = await client.next()
        assert (answer.text, answer.fallback) == ("one", Fallback.SERVER_FAILED)
    assert "scripted failure" in caplog.text


async def test_a_failing_runtime_is_reported_and_logged_and_the_connection_goes_on(caplog):
    """A `ModelError` means a shutdown only while the service shuts down."""
    failing = True

    class Failing(FakeBackend):
        async def first_pass(self, *args, **options):
            if failing:
                raise ModelError("an attention row is missing")
            return await super().first_pass(*args, **options)

    async with running(service(Failing())) as url, edge(url) as client:
        await client.ask(SURE, picture())
        error = await client.next()
        assert (error.code, error.retry_after_ms) == (ErrorCode.INTERNAL, 1000)
        assert "an attention row is missing" in caplog.text
        failing = False
        await client.ask(SURE, picture())
        assert isinstance(await client.next(), Answer)


async def test_a_server_whose_model_has_failed_says_so_and_is_not_ready():
    """As at a shutdown, so that a load balancer can use another server."""

    class Dying(FakeBackend):
        failed = False

        async def first_pass(self, *args, **options):
            if self.failed:
                raise ModelError("the engine is gone")
            return await super().first_pass(*args, **options)

    backend = Dying()
    async with (
        running(service(backend)) as url,
        httpx.AsyncClient(base_url=http(url)) as web,
        edge(url) as client,
    ):
        await client.ask(SURE, picture())
        assert isinstance(await client.next(), Answer)
        assert (await web.get("/readyz")).status_code == 200
        backend.failed = True
        answer = await web.get("/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        await client.ask(SURE)
        error = await client.next()
        assert (error.code, error.text) == (
            ErrorCode.SHUTTING_DOWN,
            "the model has failed; this server has to be started again",
        )
        with pytest.raises(InvalidStatus) as refused:
            async with edge(url):
                pass
        assert refused.value.response.status_code == 503
        assert b"the model has failed" in refused.value.response.body
        assert (await web.get("/healthz")).status_code == 200


async def test_a_model_that_fails_during_a_question_is_reported(caplog):
    class Dying(FakeBackend):
        failed = False

        async def first_pass(self, *args, **options):
            self.failed = True
            raise ModelError("the engine ran out of memory")

    async with running(service(Dying())) as url, edge(url) as client:
        await client.ask(SURE, picture())
        error = await client.next()
        assert error.code is ErrorCode.SHUTTING_DOWN
        assert "the model has failed" in error.text
        # The cause is for the operator only.
        assert "memory" not in error.text
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "the engine ran out of memory" in line.getMessage()


async def test_a_model_that_is_closed_during_a_question_at_a_shutdown_is_no_error(caplog):
    class Closing(FakeBackend):
        async def first_pass(self, *args, **options):
            mine.state.draining = True
            raise ModelError("the model was closed")

    mine = service(Closing())
    async with running(mine) as url, edge(url) as client:
        await client.ask(SURE, picture())
        assert (await client.next()).code is ErrorCode.SHUTTING_DOWN
    assert "the model was closed" not in caplog.text


async def test_a_question_that_takes_too_long_in_its_second_stage_has_its_first_answer():
    limits = {"question_timeout_s": 0.2, "region_deadline_s": 60.0}
    async with running(service(limits=limits)) as url, edge(url) as client:
        await unsure(client)
        answer = await client.next()
        assert (answer.text[:5], answer.fallback) == ("first", Fallback.DEADLINE)


async def test_a_first_pass_that_takes_too_long_is_refused_with_a_reason():
    backend = FakeBackend(play=lambda *_: Script("one", "two", delay_s=5.0))
    running_service = service(backend, limits={"question_timeout_s": 0.1})
    async with running(running_service) as url, edge(url) as client:
        await client.ask(SURE, picture())
        assert (await client.next()).code is ErrorCode.DEADLINE
        await settled(running_service)


# ---- bad input -------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG whose header promises 30000 × 30000 px, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("view", "code"),
    [
        (b"", ErrorCode.BAD_IMAGE),
        (b"GIF89a" + bytes(40), ErrorCode.BAD_IMAGE),
        (picture(codec=Codec.PNG), ErrorCode.BAD_IMAGE),  # not among the codecs of the Hello
        (picture(size=(111, 112), codec=Codec.JPEG), ErrorCode.BAD_IMAGE),
        (picture(size=(500, 500), codec=Codec.JPEG), ErrorCode.TOO_LARGE),
        (picture(codec=Codec.JPEG)[:-300], ErrorCode.BAD_IMAGE),
    ],
)
async def test_a_bad_view_is_refused_and_the_connection_goes_on(view, code):
    async with running(service()) as url, edge(url, greet=False) as client:
        await client.greet(codecs=(Codec.JPEG, Codec.WEBP))
        id = await client.ask(SURE, view)
        error = await client.next()
        assert (error.id, error.code) == (id, code)
        assert "\n" not in error.text
        await client.ask(SURE, picture(codec=Codec.JPEG), view_id=2)
        assert isinstance(await client.next(), Answer)


async def test_a_decompression_bomb_is_refused_by_its_header():
    async with running(service()) as url, edge(url) as client:
        await client.ask(SURE, bomb())
        assert (await client.next()).code is ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("question", "code"),
    [
        ("  ", ErrorCode.BAD_QUESTION),
        ("an <refuse> of", ErrorCode.BAD_QUESTION),
        ("x" * 5000, ErrorCode.BAD_QUESTION),
    ],
)
async def test_a_bad_question_is_refused_before_the_model_sees_it(question, code):
    backend = FakeBackend()
    async with running(service(backend)) as url, edge(url) as client:
        await client.ask(question, picture())
        assert (await client.next()).code is code
        assert backend.views == set()


@pytest.mark.parametrize(
    ("policy", "eta"),
    [
        (NeverPolicy(), 0.5),
        (ThresholdPolicy(Metric.MARGIN, Aggregate.FULL, 0.5), 2.0),
        (ThresholdPolicy(Metric.ENTROPY, Aggregate.FULL, 0.5), -1.0),
        (ThresholdPolicy(Metric.ENTROPY, Aggregate.FULL, 0.5), float("nan")),
    ],
)
async def test_an_option_that_cannot_be_honoured_is_refused(policy, eta):
    async with running(service(policy=policy)) as url, edge(url) as client:
        await client.ask(SURE, picture(), options=Options(eta=eta))
        assert (await client.next()).code is ErrorCode.BAD_OPTION


async def test_a_random_policy_repeats_itself_for_the_same_questions():
    draws = []
    for _ in range(2):
        async with running(service(policy=RandomPolicy(0.5, seed=3))) as url, edge(url) as client:
            requested = []
            for i in range(12):
                id = await client.ask(f"{SURE} {i}", picture() if i == 0 else None)
                event = await client.next()
                requested.append(isinstance(event, RegionWanted))
                if requested[-1]:
                    await client.region(id, picture())
                    await client.next()
            draws.append(requested)
    assert draws[0] == draws[1]
    assert {True, False} == set(draws[0])


async def test_an_unknown_view_asks_for_the_pixels():
    async with running(service()) as url, edge(url) as client:
        await client.ask(SURE, view_id=9)
        error = await client.next()
        assert (error.code, error.retry_after_ms) == (ErrorCode.VIEW_GONE, 0)


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"garbage", encode(Hello(1, (Codec.JPEG,))), "a text frame"]
)
async def test_garbage_ends_its_own_connection_with_a_reason_and_no_other(frame):
    async with running(service()) as url, edge(url) as client, edge(url) as other:
        await client.websocket.send(frame)
        error = await client.next()
        assert isinstance(error, Error)
        assert error.id == 0
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1002
        await other.ask(SURE, picture())
        assert isinstance(await other.next(), Answer)


async def test_a_frame_over_the_limit_is_not_even_read():
    limits = {"connection": ServerLimits(max_frame_bytes=10_000)}
    async with running(service(limits=limits)) as url, edge(url) as client:
        await client.websocket.send(bytes(50_000))
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1009


async def test_a_silent_connection_is_dropped():
    limits = {"hello_timeout_s": 0.05}
    async with running(service(limits=limits)) as url, edge(url, greet=False) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.websocket.recv()
        assert closed.value.rcvd.code == 1008
