"""Places of pictures: their meaning, on the wire and in both state machines."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_collab.errors import ErrorCode, LocalProtocolError
from vlm_collab.geometry import Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import EdgeSession
from vlm_collab.protocol.encoding import decode_up, encode
from vlm_collab.protocol.image_positions import (
    Place,
    join_parts,
    needed_places,
    places_fault,
    split_at_pictures,
)
from vlm_collab.protocol.messages import Ask, Error, MoreView, PicturePlace, Turn, Welcome
from vlm_collab.protocol.server_session import ServerSession

VIEW = b"\xff\xd8\xff"
MORE = (MoreView(VIEW, 30, 40),)
pieces = st.lists(st.one_of(st.text("ab é字\n", max_size=4), st.integers(0, 3)), max_size=8)


@given(pieces)
def test_join_parts_undoes_split_at_pictures(parts) -> None:
    text, spots = join_parts(parts)
    assert text == "".join(part for part in parts if isinstance(part, str))
    assert join_parts(split_at_pictures(text, spots)) == (text, spots)


class OlderTurn(msgspec.Struct, array_like=True):
    question: str
    answer: str


class OlderAsk(msgspec.Struct, array_like=True, tag=3):
    id: int
    question: str
    view_id: int
    view: bytes | None
    source_width: int
    source_height: int
    options: None = None
    history: tuple[OlderTurn, ...] = ()
    more: tuple[MoreView, ...] = ()


def ask(places=(), history=(), more=MORE) -> Ask:
    return Ask(
        1, "what is it?", 1, VIEW, 10, 20, None, tuple(history), tuple(more),
        tuple(PicturePlace(*place) for place in places),
    )  # fmt: skip


def test_a_question_without_places_has_no_bytes_for_them() -> None:
    """Its bytes are those of the protocol before places were added."""
    turn = Turn("what?", "a sign")
    frame = msgspec.msgpack.decode(encode(ask(history=[turn], more=())))
    assert frame == [3, 1, "what is it?", 1, VIEW, 10, 20, None, [["what?", "a sign"]]]
    frame = msgspec.msgpack.decode(encode(ask([(4, 0), (11, 1)], [turn])))
    assert frame[-2:] == [[[VIEW, 30, 40]], [[4, 0], [11, 1]]]
    placed = Turn("what?", "a sign", (PicturePlace(0, 1),))
    frame = msgspec.msgpack.decode(encode(ask([(4, 0)], [placed])))
    assert frame[8] == [["what?", "a sign", [[0, 1]]]]


def test_an_older_peer_reads_what_a_newer_one_writes() -> None:
    placed = Turn("what?", "a sign", (PicturePlace(0, 1),))
    read = msgspec.msgpack.decode(encode(ask([(4, 0)], [placed])), type=OlderAsk)
    assert (read.question, read.history[0].answer) == ("what is it?", "a sign")
    frame = msgspec.msgpack.encode([3, 1, "what?", 1, VIEW, 10, 20, None, [["so?", "yes"]]])
    assert decode_up(frame).all_places == ()


def test_places_of_a_conversation_are_one_list() -> None:
    message = ask([(4, 0)], [Turn("what?", "a sign", (PicturePlace(0, 1),)), Turn("so?", "yes")])
    assert message.all_places == (Place(0, 0, 1), Place(2, 4, 0))


WRONG = [
    ([(12, 0), (12, 1)], (), "after the end"),
    ([(3, 1), (2, 0)], (), "reading order"),
    ([(3, 0)], (), "has no place"),
    ([(3, 0), (4, 2)], (), "names picture 2, but the last one is 1"),
    ([], [Turn("what?", "", (PicturePlace(6, 0), PicturePlace(6, 1)))], "after the end"),
    ([(0, 0)] * 33, [Turn("what?", "", (PicturePlace(0, 1),) * 33)], "at most 64"),
]


def sessions(*features: str) -> tuple[EdgeSession, ServerSession]:
    edge, server = EdgeSession(), ServerSession()
    edge.hello((Codec.JPEG,))
    for frame in edge.data_to_send():
        server.receive(frame)
    codecs = (Codec.JPEG,)
    server.send_welcome(
        Welcome(bytes(16), "m", 112, 112, 0, 8, 8, codecs, 100_000, 1000, 4, features)
    )
    for frame in server.data_to_send():
        edge.receive(frame)
    return edge, server


@pytest.mark.parametrize(("places", "history", "complaint"), WRONG)
def test_both_ends_refuse_impossible_places(places, history, complaint) -> None:
    message = ask(places, history)
    edge, server = sessions("places")
    with pytest.raises(LocalProtocolError, match=complaint):
        edge.ask(
            message.question, 1, Size(10, 20), VIEW,
            history=message.history, more=MORE, places=message.places,
        )  # fmt: skip
    assert edge.data_to_send() == []
    refused = server.receive(encode(message))
    assert isinstance(refused, Error)
    assert refused.code is ErrorCode.BAD_QUESTION
    assert complaint in refused.text


def test_places_are_refused_if_the_server_would_ignore_them() -> None:
    places = (PicturePlace(3, 0), PicturePlace(4, 1))
    edge, _ = sessions("history", "pictures")
    with pytest.raises(LocalProtocolError, match="order of texts and pictures"):
        edge.ask("what?", 1, Size(10, 20), VIEW, more=MORE, places=places)
    edge, server = sessions("places")
    edge.ask("what?", 1, Size(10, 20), VIEW, more=MORE, places=places)
    (frame,) = edge.data_to_send()
    got = server.receive(frame)
    assert isinstance(got, Ask)
    assert got.all_places == (Place(0, 3, 0), Place(0, 4, 1))


@pytest.mark.parametrize(
    ("places", "texts", "kept"),
    [
        ([(0, 1, 0), (0, 1, 1)], ["what?"], False),
        ([(0, 0, 0), (0, 2, 1)], ["  what?"], False),
        ([(0, 0, 0), (0, 2, 1)], ["a: what?"], True),
        ([(0, 1, 0), (0, 1, 0)], ["what?"], True),
        ([(0, 0, 0), (1, 0, 1)], ["what?", "so?"], True),
        ([(1, 0, 0)], ["what?", "so?"], False),
    ],
)
def test_places_are_needed_if_text_separates_pictures_or_one_repeats(places, texts, kept) -> None:
    given = tuple(Place(*place) for place in places)
    assert places_fault(given, texts, 1 + max(place.picture for place in given)) is None
    assert needed_places(given, texts) == (given if kept else ())
