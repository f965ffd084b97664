"""The two state machines: the table, the limits, and every interleaving of the two."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from vlm_collab.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from vlm_collab.geometry import Box, Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import (
    EdgeLimits,
    EdgeSession,
    RegionDeclined,
    RegionWanted,
    TextUpdate,
)
from vlm_collab.protocol.encoding import encode, websocket_bytes
from vlm_collab.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Cancel,
    Decline,
    DeclineReason,
    Error,
    Fallback,
    Hello,
    Partial,
    Region,
    RegionRequest,
    Stage,
    Usage,
    Welcome,
)
from vlm_collab.protocol.server_session import ServerLimits, ServerSession
from vlm_collab.protocol.table import TRANSITIONS, State

SOURCE = Size(896, 448)
WELCOME = Welcome(bytes(16), "m", 112, 112, 0, 8, 8, (Codec.JPEG,), 10_000, 100, 4)


def request(id: int, *, index: int = 0, side_px: int = 112, first: str = "1") -> RegionRequest:
    return RegionRequest(id, first, 1_000_000, index, side_px, 1, 1, 112, 112, Codec.JPEG, 90, 1000)


def pair(limits: ServerLimits | None = None, edge_limits: EdgeLimits | None = None):
    """Two sessions after `Hello` and `Welcome`."""
    edge = EdgeSession(limits=edge_limits or EdgeLimits())
    server = ServerSession(limits=limits or ServerLimits(10_000, 100, 4))
    edge.hello((Codec.JPEG,))
    carry(edge, server)
    server.send_welcome(WELCOME)
    carry(server, edge)
    return edge, server


def carry(source, target):
    """Deliver all frames and return the events."""
    return [target.receive(frame) for frame in source.data_to_send()]


def asked(edge, server, question="what?"):
    id = edge.ask(question, 1, SOURCE, b"view")
    carry(edge, server)
    return id


def answer(server, id, text="done"):
    return server.answer(id, text, Stage.FIRST, Fallback.NONE, 0.1, Usage(first_ms=3))


# ---- one question ----------------------------------------------------------------------------


def test_a_sure_answer():
    edge, server = pair()
    id = edge.ask("what?", 7, SOURCE, b"view")
    assert carry(edge, server) == [Ask(id, "what?", 7, b"view", 896, 448, None)]
    answer(server, id)
    (got,) = carry(server, edge)
    assert (got.text, got.usage.first_ms) == ("done", 3)
    assert edge.in_flight == server.in_flight == ()
    assert edge.state(id) is server.state(id) is State.ENDED


def test_the_whole_second_stage_and_its_exact_box():
    edge, server = pair()
    id = asked(edge, server)
    server.request_region(request(id, index=9, side_px=112))
    (wanted,) = carry(server, edge)
    assert isinstance(wanted, RegionWanted)
    # Cell (1, 1) of 112 × 56 px: centre (168, 84), ± 56.
    assert wanted.box == Box(112, 28, 224, 140)
    edge.send_region(id, b"crop")
    assert carry(edge, server) == [Region(id, b"crop")]
    server.answer(id, "47", Stage.SECOND, Fallback.NONE, 0.1, Usage())
    (got,) = carry(server, edge)
    assert (got.text, got.stage) == ("47", Stage.SECOND)


def test_streamed_text_is_rebuilt_even_where_it_changes():
    edge, server = pair()
    id = asked(edge, server)
    texts = ["4", "47", "4 7", "", "x"]
    for text in texts:
        server.partial(id, Stage.FIRST, text)
    assert [event.text for event in carry(server, edge)] == texts
    server.request_region(request(id))
    carry(server, edge)
    edge.send_region(id, b"")
    carry(edge, server)
    server.partial(id, Stage.SECOND, "xy")
    assert carry(server, edge) == [TextUpdate(id, Stage.SECOND, "xy")]


def test_questions_of_one_connection_end_in_any_order():
    edge, server = pair()
    ids = [asked(edge, server, f"q{i}") for i in range(4)]
    for id in reversed(ids):
        answer(server, id, f"a{id}")
    assert [(a.id, a.text) for a in carry(server, edge)] == [(i, f"a{i}") for i in reversed(ids)]


def test_usage_reports_the_real_bytes_of_its_question():
    edge, server = pair()
    id = edge.ask("what?", 1, SOURCE, b"v" * 300)
    (frame,) = edge.data_to_send()
    server.receive(frame)
    server.request_region(request(id))
    (down,) = server.data_to_send()
    edge.receive(down)
    edge.send_region(id, b"r" * 200)
    (up,) = edge.data_to_send()
    assert edge.bytes_of(id) == (
        websocket_bytes(len(frame), masked=True) + websocket_bytes(len(up), masked=True),
        websocket_bytes(len(down), masked=False),
    )
    server.receive(up)
    expected = edge.bytes_of(id)
    sent = answer(server, id)
    assert (sent.usage.bytes_up, sent.usage.bytes_down) == expected
    assert edge.traffic.total_bytes("up") == server.traffic.total_bytes("up")


# ---- messages that cross ---------------------------------------------------------------------


def test_a_region_that_crosses_the_answer_is_dropped():
    edge, server = pair()
    id = asked(edge, server)
    server.request_region(request(id))
    carry(server, edge)
    edge.send_region(id, b"late")
    answer(server, id)  # the server's deadline
    assert carry(edge, server) == [None]
    assert carry(server, edge)[0].text == "done"


def test_a_cancel_that_crosses_the_answer_is_dropped():
    edge, server = pair()
    id = asked(edge, server)
    edge.cancel(id)
    answer(server, id)
    assert carry(edge, server) == [None]
    assert isinstance(carry(server, edge)[0], Answer)
    assert edge.state(id) is State.ENDED


def test_after_a_cancel_the_server_sends_only_the_end():
    edge, server = pair()
    id = asked(edge, server)
    edge.cancel(id)
    assert carry(edge, server) == [Cancel(id)]
    assert server.partial(id, Stage.FIRST, "x") is False
    assert server.request_region(request(id)) is False
    assert server.error(id, ErrorCode.CANCELLED, "cancelled") is True
    assert answer(server, id) is None
    assert carry(server, edge) == [Error(id, ErrorCode.CANCELLED, "cancelled")]


# ---- wrong order -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [s for s in State if s is not State.NEW])
@pytest.mark.parametrize("message", [Ask, Region, Decline, Cancel])
def test_the_server_refuses_every_move_outside_the_table(state, message):
    edge, server = pair()
    id = asked(edge, server)
    if state in (State.WANTED, State.FINISHING):
        server.request_region(request(id))
    if state is State.FINISHING:
        server.receive(encode(Region(id, b"")))
    if state is State.CANCELLED:
        server.receive(encode(Cancel(id)))
    if state is State.ENDED:
        answer(server, id)
    assert server.state(id) is state
    frame = {
        Ask: Ask(id, "again?", 1, None, 1, 1),
        Region: Region(id, b""),
        Decline: Decline(id, DeclineReason.LIMIT),
        Cancel: Cancel(id),
    }[message]
    server.data_to_send()
    legal = (state, message) in TRANSITIONS
    crossed = state is State.ENDED and message is not Ask
    if legal or crossed:
        server.receive(encode(frame))
    else:
        with pytest.raises(RemoteProtocolError) as caught:
            server.receive(encode(frame))
        assert server.data_to_send() == [encode(Error(0, ErrorCode.BAD_ORDER, str(caught.value)))]


def test_the_edge_refuses_messages_about_unknown_questions():
    for message in (
        Answer(5, "x", Stage.FIRST, Fallback.NONE, 0, Usage()),
        request(5),
        Partial(5, Stage.FIRST, 0, "x"),
        Error(5, ErrorCode.BUSY, "x"),
    ):
        edge, _ = pair()
        with pytest.raises(RemoteProtocolError):
            edge.receive(encode(message))


def test_a_second_answer_to_a_question_is_refused():
    edge, server = pair()
    id = asked(edge, server)
    answer(server, id)
    (frame,) = server.data_to_send()
    edge.receive(frame)
    with pytest.raises(RemoteProtocolError):
        edge.receive(frame)


def test_questions_before_hello_and_welcome_are_refused():
    edge, server = EdgeSession(), ServerSession()
    with pytest.raises(LocalProtocolError):
        edge.ask("what?", 1, SOURCE)
    with pytest.raises(RemoteProtocolError):
        server.receive(encode(Ask(1, "what?", 1, b"", 1, 1)))


def test_another_version_is_refused_with_its_own_code():
    server = ServerSession()
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(encode(Hello(VERSION + 1, (Codec.JPEG,))))
    assert caught.value.code is ErrorCode.UNSUPPORTED_VERSION


def test_local_mistakes_are_local_errors():
    edge, server = pair()
    id = asked(edge, server)
    for wrong in (
        lambda: edge.send_region(id, b""),
        lambda: edge.decline(id, DeclineReason.LIMIT),
        lambda: edge.cancel(99),
        lambda: edge.hello((Codec.JPEG,)),
        lambda: server.answer(99, "", Stage.FIRST, Fallback.NONE, 0.0, Usage()),
        lambda: server.error(99, ErrorCode.BUSY, ""),
        lambda: server.request_region(request(99)),
    ):
        with pytest.raises(LocalProtocolError):
            wrong()


# ---- limits ----------------------------------------------------------------------------------


def test_a_frame_over_the_limit_is_refused_before_it_is_decoded():
    _, server = pair()
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(b"\xc1" * 10_001)  # 0xc1 is no msgpack: decoding would say BAD_FRAME
    assert caught.value.code is ErrorCode.TOO_LARGE


@pytest.mark.parametrize(
    ("question", "code"),
    [
        ("x" * 101, ErrorCode.TOO_LARGE),
        ("é" * 51, ErrorCode.TOO_LARGE),
        (" ", ErrorCode.BAD_QUESTION),
    ],
)
def test_a_question_over_a_limit_is_refused_and_the_connection_goes_on(question, code):
    _, server = pair()
    refusal = server.receive(encode(Ask(1, question, 1, b"", 1, 1)))
    assert (refusal.id, refusal.code) == (1, code)
    assert server.in_flight == ()
    assert server.data_to_send() == [encode(refusal)]
    assert isinstance(server.receive(encode(Ask(2, "what?", 1, b"", 1, 1))), Ask)


def test_questions_in_flight_are_bounded_on_both_sides():
    edge, server = pair()
    for _ in range(4):
        asked(edge, server)
    with pytest.raises(LocalProtocolError):
        edge.ask("one more", 1, SOURCE)
    assert server.receive(encode(Ask(5, "one more", 1, b"", 1, 1))).code is ErrorCode.BUSY
    assert len(server.in_flight) == 4


@pytest.mark.parametrize(
    ("limits", "side_px", "index", "reason"),
    [
        (EdgeLimits(max_region_share=0.02), 112, 9, DeclineReason.LIMIT),
        (EdgeLimits(max_regions=0), 112, 9, DeclineReason.LIMIT),
        (EdgeLimits(), 112, 64, DeclineReason.BAD_REQUEST),
        (EdgeLimits(), 111, 0, DeclineReason.BAD_REQUEST),
    ],
)
def test_the_edge_declines_requests_over_its_limits(limits, side_px, index, reason):
    edge, server = pair(edge_limits=limits)
    id = asked(edge, server)
    server.request_region(request(id, index=index, side_px=side_px))
    (event,) = carry(server, edge)
    assert isinstance(event, RegionDeclined)
    assert event.reason is reason
    assert carry(edge, server) == [Decline(id, reason)]
    answer(server, id)
    assert isinstance(carry(server, edge)[0], Answer)


@pytest.mark.parametrize(
    ("width", "height", "limits"),
    [
        (1025, 1024, EdgeLimits()),
        (2**20, 2, EdgeLimits()),
        (2000, 1500, EdgeLimits()),
        (60_000, 60_000, EdgeLimits()),
        (113, 112, EdgeLimits(max_view_pixels=112 * 112)),
    ],
)
def test_a_server_that_wants_larger_views_than_the_edge_sends_is_refused(width, height, limits):
    """Such a server could ask for the whole picture as a view."""
    edge = EdgeSession(limits=limits)
    edge.hello((Codec.JPEG,))
    greeting = msgspec.structs.replace(WELCOME, view_width=width, view_height=height)
    with pytest.raises(RemoteProtocolError, match=f"{width} x {height} px") as caught:
        edge.receive(encode(greeting))
    # Not TOO_LARGE, which would blame the question.
    assert caught.value.code is ErrorCode.BAD_OPTION
    assert edge.welcome is None
    with pytest.raises(LocalProtocolError):
        edge.ask("what?", 1, SOURCE, b"view")


@pytest.mark.parametrize(
    ("width", "height", "limits"),
    [
        (1024, 1024, EdgeLimits()),
        (2**20, 1, EdgeLimits()),
        (112, 112, EdgeLimits(max_view_pixels=112 * 112)),
        (2000, 1500, EdgeLimits(max_view_pixels=3_000_000)),
    ],
)
def test_views_up_to_the_limit_are_accepted(width, height, limits):
    edge = EdgeSession(limits=limits)
    edge.hello((Codec.JPEG,))
    greeting = msgspec.structs.replace(WELCOME, view_width=width, view_height=height)
    assert edge.receive(encode(greeting)) == greeting


def test_closing_ends_all_questions_in_flight_with_an_error():
    edge, server = pair()
    ids = [asked(edge, server) for _ in range(3)]
    server.close(ErrorCode.SHUTTING_DOWN, "bye", 500)
    events = carry(server, edge)
    assert [(e.id, e.code) for e in events] == [(id, ErrorCode.SHUTTING_DOWN) for id in [*ids, 0]]
    assert edge.in_flight == ()


def test_messages_that_cross_the_close_of_the_server_are_dropped():
    edge, server = pair()
    id = asked(edge, server)
    server.request_region(request(id))
    carry(server, edge)
    edge.decline(id, DeclineReason.LIMIT)
    server.answer(id, "first", Stage.FIRST, Fallback.OVERLOAD, 1.0, Usage())
    server.close(ErrorCode.SHUTTING_DOWN, "bye")
    assert carry(edge, server) == [None]
    assert [event.text for event in carry(server, edge)] == ["first", "bye"]


def test_a_too_long_streamed_text_is_refused():
    edge, server = pair(edge_limits=EdgeLimits(max_text_chars=10))
    id = asked(edge, server)
    server.partial(id, Stage.FIRST, "x" * 10)
    server.partial(id, Stage.FIRST, "x" * 11)
    first, second = server.data_to_send()
    assert edge.receive(first).text == "x" * 10
    with pytest.raises(RemoteProtocolError) as caught:
        edge.receive(second)
    assert caught.value.code is ErrorCode.TOO_LARGE


# ---- any bytes, any order --------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_end_in_a_clean_protocol_error(frames):
    for make in (lambda: pair()[0], lambda: pair()[1], ServerSession, EdgeSession):
        session = make()
        for frame in frames:
            try:
                session.receive(frame)
            except RemoteProtocolError as error:
                assert "\n" not in str(error)
                with pytest.raises(LocalProtocolError):
                    session.receive(b"")  # closed for good
                break


class Interleavings(RuleBasedStateMachine):
    """Both ends act whenever they may; the link delays messages but keeps their order."""

    def __init__(self):
        super().__init__()
        self.edge, self.server = pair()
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.asked: dict[int, str] = {}
        self.ended: dict[int, str] = {}
        self.cancelled: set[int] = set()
        self.closing = False

    def _collect(self):
        self.up.extend(self.edge.data_to_send())
        self.down.extend(self.server.data_to_send())

    def _pick(self, session, states, data):
        ids = [id for id in session.in_flight if session.state(id) in states]
        return data.draw(st.sampled_from(ids)) if ids else None

    @precondition(lambda self: self.edge.welcome and len(self.edge.in_flight) < 4)
    @rule()
    def ask(self):
        question = f"question {len(self.asked) + 1}"
        id = self.edge.ask(question, 1, SOURCE, b"view")
        assert id not in self.asked
        self.asked[id] = question
        self._collect()

    @rule(data=st.data())
    def send_region(self, data):
        id = self._pick(self.edge, {State.WANTED}, data)
        if id is not None:
            self.edge.send_region(id, f"region {id}".encode())
            self._collect()

    @rule(data=st.data())
    def decline(self, data):
        id = self._pick(self.edge, {State.WANTED}, data)
        if id is not None:
            self.edge.decline(id, DeclineReason.PRIVACY)
            self._collect()

    @rule(data=st.data())
    def cancel(self, data):
        id = self._pick(self.edge, set(State) - {State.CANCELLED}, data)
        if id is not None:
            self.edge.cancel(id)
            self.cancelled.add(id)
            self._collect()

    @rule(data=st.data(), text=st.text(max_size=5))
    def stream(self, data, text):
        id = self._pick(self.server, {State.FIRST, State.FINISHING}, data)
        if id is not None:
            stage = Stage.FIRST if self.server.state(id) is State.FIRST else Stage.SECOND
            self.server.partial(id, stage, text)
            self._collect()

    @rule(data=st.data())
    def request_region(self, data):
        id = self._pick(self.server, {State.FIRST}, data)
        if id is not None:
            self.server.request_region(request(id, first=f"first {id}"))
            self._collect()

    @rule(data=st.data())
    def answer_question(self, data):
        id = self._pick(self.server, set(State), data)
        if id is not None:
            self.server.answer(id, f"answer {id}", Stage.FIRST, Fallback.NONE, 0.0, Usage())
            self._collect()

    @rule(data=st.data())
    def fail_question(self, data):
        id = self._pick(self.server, set(State), data)
        if id is not None:
            self.server.error(id, ErrorCode.INTERNAL, f"error {id}")
            self._collect()

    @precondition(lambda self: not self.closing and len(self.asked) > 2)
    @rule()
    def close_server(self):
        self.server.close(ErrorCode.SHUTTING_DOWN, "closed")
        self.closing = True
        self._collect()

    @precondition(lambda self: self.up)
    @rule()
    def deliver_up(self):
        event = self.server.receive(self.up.popleft())
        match event:
            case Ask(id=id, question=question):
                assert question == self.asked[id]
            case Region(id=id, image=image):
                assert image == f"region {id}".encode()
            case Cancel(id=id):
                assert id in self.cancelled
        self._collect()

    @precondition(lambda self: self.down)
    @rule()
    def deliver_down(self):
        event = self.edge.receive(self.down.popleft())
        match event:
            case Error(id=0):
                assert self.closing
                # A message that crossed the close on its way up gets no reply: the caller ends the
                # question, as when a link is lost.
                for id in self.edge.in_flight:
                    self.ended[id] = "closed"
                self.edge = EdgeSession()
            case Answer(id=id, text=text) | Error(id=id, text=text):
                assert id not in self.ended
                assert text in (f"answer {id}", f"error {id}", "closed")
                self.ended[id] = text
            case RegionWanted(id=id, request=wanted):
                assert wanted.first == f"first {id}"
                assert id not in self.cancelled
        self._collect()

    @invariant()
    def every_question_is_either_in_flight_or_ended(self):
        assert set(self.ended).isdisjoint(self.edge.in_flight)
        assert set(self.asked) == set(self.ended) | set(self.edge.in_flight)

    def teardown(self):
        """When the server has ended all its questions, neither end has any left."""
        for _ in range(3):
            while self.up:
                self.deliver_up()
            for id in self.server.in_flight:
                self.server.answer(id, f"answer {id}", Stage.FIRST, Fallback.NONE, 0.0, Usage())
            self._collect()
            while self.down:
                self.deliver_down()
        assert self.edge.in_flight == self.server.in_flight == ()
        assert set(self.ended) == set(self.asked)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=60)


# ---- peers of other versions -------------------------------------------------------------------


class OlderAnswer(msgspec.Struct, array_like=True, tag=19):
    """`Answer` as read by older edges, without tokens and `Fallback.NO_DETAIL`."""

    id: int
    text: str
    stage: Stage
    fallback: int
    uncertainty_micro: int
    usage: Usage


def test_no_detail_is_read_by_new_and_old_edges():
    edge, server = pair()
    edge.ask("why?", 1, SOURCE, b"view")
    carry(edge, server)
    server.answer(1, "so", Stage.FIRST, Fallback.NO_DETAIL, 1.5, Usage())
    (frame,) = server.data_to_send()
    answer = edge.receive(frame)
    assert isinstance(answer, Answer)
    assert answer.why_first is Fallback.NO_DETAIL
    older = msgspec.msgpack.decode(frame, type=OlderAnswer)
    assert (older.text, older.fallback) == ("so", Fallback.NONE)
    assert older.fallback in range(7), "a number that older edges know"


def test_all_other_answers_are_the_same_bytes_as_before():
    for fallback in set(Fallback) - {Fallback.NO_DETAIL}:
        answer = Answer(1, "so", Stage.FIRST, fallback, 9, Usage())
        assert answer.why_first is fallback
        assert msgspec.msgpack.decode(encode(answer)) == [19, 1, "so", 1, fallback, 9, [0] * 9]
