"""Messages as bytes: round trips, garbage, and the overhead on the wire."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_collab.errors import ErrorCode, RemoteProtocolError
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.encoding import decode_down, decode_up, encode, websocket_bytes
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Cancel,
    Decline,
    DeclineReason,
    Error,
    Fallback,
    Finish,
    Hello,
    MoreView,
    Options,
    Partial,
    Region,
    RegionRequest,
    Retransmit,
    Stage,
    Token,
    Turn,
    Usage,
    Welcome,
    micro,
    short_millis,
)

UP = (Hello, Ask, Region, Decline, Cancel)
DOWN = (Welcome, Partial, RegionRequest, Answer, Error)

ids = st.integers(1, 2**32 - 1)
sides = st.integers(1, 2**20)
texts = st.text(max_size=60)
bits = st.floats(0, 40, allow_nan=False)
micros = st.integers(0, 2**32 - 1)
short = st.integers(0, 65535)
targets = st.integers(1, 65535)
millis = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**53)
codecs = st.lists(st.sampled_from(Codec), min_size=1, max_size=3).map(tuple)
options = st.none() | st.builds(
    Options,
    st.sampled_from(Retransmit),
    st.none() | bits,
    st.none() | st.integers(1, 65535),
    st.booleans(),
    st.booleans(),
    st.lists(st.text(min_size=1, max_size=64), max_size=4).map(tuple),
    st.none() | st.floats(0, 2),
    st.none() | st.floats(0.001, 1),
    st.none() | st.integers(0, 2**63 - 1),
    st.booleans(),
)
histories = st.lists(st.builds(Turn, texts, texts), max_size=3).map(tuple)
more = st.lists(
    st.builds(MoreView, st.none() | st.binary(max_size=99), sides, sides), max_size=3
).map(tuple)
messages = st.one_of(
    st.builds(Hello, st.integers(1, 255), codecs, st.binary(max_size=32), st.text(max_size=64)),
    st.builds(
        Ask,
        ids,
        texts,
        ids,
        st.none() | st.binary(max_size=99),
        sides,
        sides,
        options,
        histories,
        more,
    ),
    st.builds(Region, ids, st.binary(max_size=99)),
    st.builds(Decline, ids, st.sampled_from(DeclineReason)),
    st.builds(Cancel, ids),
    st.builds(
        Welcome,
        st.binary(min_size=8, max_size=32),
        texts,
        sides,
        sides,
        st.integers(0, 2),
        st.integers(1, 4096),
        st.integers(1, 4096),
        codecs,
        counts,
        counts,
        counts,
        st.lists(st.text(max_size=20), max_size=4).map(tuple),
    ),
    st.builds(Partial, ids, st.sampled_from(Stage), counts, texts),
    st.builds(
        RegionRequest,
        ids,
        texts,
        micros,
        counts,
        st.integers(1, 2**21),
        st.integers(1, 4096),
        st.integers(1, 4096),
        targets,
        targets,
        st.sampled_from(Codec),
        st.integers(1, 100),
        short,
        st.binary(max_size=64),
        st.integers(0, 15),
    ),
    st.builds(
        Answer,
        ids,
        texts,
        st.sampled_from(Stage),
        st.sampled_from(Fallback),
        micros,
        st.builds(Usage, counts, counts, counts, counts, counts, short, short, short, short),
        st.sampled_from(Finish),
        st.lists(st.builds(Token, texts, micros), max_size=4).map(tuple),
    ),
    st.builds(Error, ids, st.sampled_from(ErrorCode), texts, st.none() | millis),
)


@given(messages)
def test_every_message_is_decoded_as_it_was_encoded(message):
    decode = decode_up if isinstance(message, UP) else decode_down
    assert decode(encode(message)) == message


@given(messages)
def test_left_out_fields_are_read_as_their_defaults(message):
    """Trimmed frames decode to the same message as frames with all fields, and are no longer."""
    spelled = msgspec.msgpack.encode(message)
    assert len(encode(message)) <= len(spelled)
    decode = decode_up if isinstance(message, UP) else decode_down
    assert decode(spelled) == message


def test_a_question_without_history_has_no_bytes_for_it():
    frame = encode(Ask(1, "q", 1, None, 640, 480, Options(stream=True)))
    assert msgspec.msgpack.decode(frame) == [3, 1, "q", 1, None, 640, 480, [0, None, None, True]]


@given(messages)
def test_a_message_is_not_understood_in_the_wrong_direction(message):
    decode = decode_down if isinstance(message, UP) else decode_up
    with pytest.raises(RemoteProtocolError):
        decode(encode(message))


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_clean_error(frame):
    for decode in (decode_up, decode_down):
        try:
            decode(frame)
        except RemoteProtocolError as error:
            assert error.code is ErrorCode.BAD_FRAME
            assert "\n" not in str(error)


@settings(max_examples=500)
@given(messages, st.data())
def test_a_damaged_frame_is_a_message_or_a_clean_error(message, data):
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frame = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for decode in (decode_up, decode_down):
        try:
            decode(frame)
        except RemoteProtocolError as error:
            assert error.code is ErrorCode.BAD_FRAME


def test_deep_nesting_is_a_clean_error():
    with pytest.raises(RemoteProtocolError):
        decode_up(b"\x91" * 100_000)


def test_later_fields_of_a_newer_peer_are_ignored():
    frame = msgspec.msgpack.encode([7, 5, "a field of the future"])
    assert decode_up(frame) == Cancel(5)


@pytest.mark.parametrize(
    "fields",
    [
        [3, 0, "q", 1, b"", 10, 10],  # ids start at 1
        [3, 1, "q", 1, b"", 0, 10],  # an image without width
        [3, 1, "q", 1, b"", 2**21, 10],  # wider than anything
        [1, 1, [9]],  # an unknown codec
        [1, 1, []],  # no codec at all
        [5, 1, 99],  # an unknown reason
        [2, 1],  # an unknown tag
    ],
)
def test_numbers_out_of_bounds_are_refused(fields):
    with pytest.raises(RemoteProtocolError):
        decode_up(msgspec.msgpack.encode(fields))


# Overhead of messages: their bytes without texts for people and picture bytes, with the WebSocket
# header. First for a 7B model, a 20-megapixel original and thousands of questions; then for the
# largest numbers that the fields can hold.
IMAGE = bytes(60_000)
BIG_USAGE = Usage(70_000, 300, 1300, 40, 20_000_000, 9999, 9999, 9999, 9999)
WIRE = {
    "ask with a view": (
        Ask(60_000, "what?", 60_000, IMAGE, 5472, 3648, None),
        len(IMAGE) + len("what?"),
    ),
    "ask with all options": (
        Ask(60_000, "what?", 9, IMAGE, 5472, 3648, Options(Retransmit.AUTO, 0.5, 20, True, True)),
        len(IMAGE) + len("what?"),
    ),
    "follow-up question": (Ask(60_000, "what?", 60_000, None, 5472, 3648, None), len("what?")),
    "region": (Region(60_000, IMAGE), len(IMAGE)),
    "decline": (Decline(60_000, DeclineReason.LIMIT), 0),
    "cancel": (Cancel(60_000), 0),
    "region request": (
        RegionRequest(
            60_000, "47", micro(1.25), 575, 3648, 24, 24, 336, 336, Codec.JPEG, 90, 60_000
        ),
        len("47"),
    ),
    "answer": (
        Answer(60_000, "47", Stage.SECOND, Fallback.NONE, micro(1.25), BIG_USAGE),
        len("47"),
    ),
    "partial": (Partial(60_000, Stage.FIRST, 100, "47"), len("47")),
    "error": (Error(60_000, ErrorCode.BUSY, "busy", 60_000), len("busy")),
    "welcome": (
        Welcome(bytes(16), "llava", 336, 336, 0, 24, 24, tuple(Codec), 2**21, 8192, 32),
        len("llava"),
    ),
}


@pytest.mark.parametrize("name", WIRE)
def test_typical_messages_add_at_most_48_bytes_headers_included(name):
    message, payload_bytes = WIRE[name]
    frame = encode(message)
    up = isinstance(message, UP)
    assert websocket_bytes(len(frame), masked=up) - payload_bytes <= 48


LAST = 2**32 - 1
EXTREME_USAGE = Usage(2**32 - 1, 65535, 65535, 65535, 2**32 - 1, *[65535] * 4)
EXTREMES = {
    "ask": (
        Ask(LAST, "what?", LAST, IMAGE * 2, 2**20, 2**20, Options(Retransmit(2), 0.5, 65535, True)),
        len(IMAGE) * 2 + len("what?"),
    ),
    "region": (Region(LAST, IMAGE * 2), len(IMAGE) * 2),
    "region request": (
        RegionRequest(
            LAST, "47", LAST, 2**24, 2**21, 4096, 4096, 65535, 65535, Codec.WEBP, 100, 65535
        ),
        len("47"),
    ),
    "answer": (Answer(LAST, "x" * 200, Stage.SECOND, Fallback.NONE, LAST, EXTREME_USAGE), 200),
    "hello": (Hello(1, tuple(Codec), bytes(16), ""), 0),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_a_message_adds_at_most_48_bytes_whatever_its_numbers_are(name):
    message, payload_bytes = EXTREMES[name]
    assert len(encode(message)) - payload_bytes <= 48


@pytest.mark.parametrize(("time_s", "wire"), [(0, 0), (0.0126, 13), (65.6, 65535), (1e9, 65535)])
def test_long_times_become_the_largest_value(time_s, wire):
    assert short_millis(time_s) == wire


@given(st.floats(0, 40))
def test_uncertainty_keeps_six_decimals_on_the_wire(value):
    answer = Answer(1, "", Stage.FIRST, Fallback.NONE, micro(value), Usage())
    assert abs(decode_down(encode(answer)).uncertainty - value) <= 5.1e-7


@pytest.mark.parametrize(
    ("payload_bytes", "header_bytes"), [(0, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)]
)
def test_websocket_headers_are_counted(payload_bytes, header_bytes):
    assert websocket_bytes(payload_bytes, masked=False) == payload_bytes + header_bytes
    assert websocket_bytes(payload_bytes, masked=True) == payload_bytes + header_bytes + 4
