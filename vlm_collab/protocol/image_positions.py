"""Positions of pictures in the texts of a conversation.

A question without places has its pictures before the first text, each once, in order. With
places, each picture has at least one place and may have several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

MAX_PLACES = 64
"""Most places of pictures in one conversation."""


class Place(NamedTuple):
    """One place of one picture.

    Attributes:
        turn: number of the question in the conversation, from 0; the open question is the last.
        position: characters (Unicode code points) of the question's text before the picture.
        picture: number of the picture, from 0.
    """

    turn: int
    position: int
    picture: int


Places: TypeAlias = tuple[Place, ...]
"""The places of a conversation in reading order. Empty: all pictures before the first text."""

TurnPlaces: TypeAlias = tuple[tuple[int, int], ...]
"""The places in one question's text: (position, picture), in reading order."""


def places_fault(places: Sequence[Place], questions: Sequence[str], pictures: int) -> str | None:
    """Say what is wrong with a conversation's places, in one line; None if they are right.

    Args:
        places: the places as received.
        questions: texts of all questions, oldest first.
        pictures: number of pictures in the conversation.
    """
    if not places:
        return None
    if len(places) > MAX_PLACES:
        return f"the pictures have {len(places)} places; at most {MAX_PLACES} are allowed"
    for place in places:
        if not 0 <= place.turn < len(questions):
            return "a picture's place is in a question that does not exist"
        if not 0 <= place.position <= len(questions[place.turn]):
            return "a picture's place is after the end of its text"
        if not 0 <= place.picture < pictures:
            return f"a place names picture {place.picture}, but the last one is {pictures - 1}"
    positions = [(place.turn, place.position) for place in places]
    if positions != sorted(positions):
        return "the places of pictures are not in reading order"
    if len({place.picture for place in places}) < pictures:
        return "a picture has no place, although others have one"
    return None


def needed_places(places: Sequence[Place], questions: Sequence[str]) -> Places:
    """The places to send with a question: none if they change nothing.

    Places are needed if there is text between two pictures, or if a picture appears twice.
    Otherwise the pictures form one run, which goes before the first text: its visual tokens are
    then computed once for all questions.

    Args:
        places: in reading order; pictures are numbered by their first appearance.
        questions: texts of all questions, oldest first.
    """
    distinct = len({place.picture for place in places}) == len(places)
    text_between = any(
        one.turn != other.turn or questions[one.turn][one.position : other.position].strip()
        for one, other in itertools.pairwise(places)
    )
    return tuple(places) if text_between or not distinct else ()


def join_parts(parts: Iterable[str | int]) -> tuple[str, TurnPlaces]:
    """Join pieces of a question into one text, with the places of the pictures between them.

    Args:
        parts: texts, joined without a separator, and numbers of pictures.
    """
    text, places = "", []
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            places.append((len(text), part))
    return text, tuple(places)


def split_at_pictures(text: str, places: Iterable[tuple[int, int]]) -> list[str | int]:
    """Split a text at its pictures, with their numbers between the pieces; undoes `join_parts`."""
    parts: list[str | int] = []
    begin = 0
    for position, picture in places:
        if position > begin:
            parts.append(text[begin:position])
        parts.append(picture)
        begin = position
    return [*parts, text[begin:]] if begin < len(text) else parts


def places_in_turn(places: Iterable[Place], turn: int) -> TurnPlaces:
    """The places within the text of one question."""
    return tuple((place.position, place.picture) for place in places if place.turn == turn)
