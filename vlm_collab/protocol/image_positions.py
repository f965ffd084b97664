"""Where the pictures of a conversation stand in its texts.

A question without places has its pictures before the first text, each once, in order. With
places, each picture stands at one place at least, and may stand at several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

MAX_PLACES = 64
"""Places of pictures in one conversation."""


class Place(NamedTuple):
    """One place of one picture.

    Attributes:
        turn: in which question of the conversation, from 0; the open one is the last.
        position: characters (Unicode code points) of its text that stand before the picture.
        picture: which of the question's pictures, from 0.
    """

    turn: int
    position: int
    picture: int


Places: TypeAlias = tuple[Place, ...]
"""In reading order. Empty: all pictures before the first text."""

Spots: TypeAlias = tuple[tuple[int, int], ...]
"""(position, picture) within one text, in reading order."""


def fault_of(places: Sequence[Place], questions: Sequence[str], pictures: int) -> str | None:
    """What is wrong with some places, in one line; None if nothing is.

    Args:
        places: as they came.
        questions: texts of all questions, oldest first.
        pictures: how many the conversation is about.
    """
    if not places:
        return None
    if len(places) > MAX_PLACES:
        return f"{len(places)} places of pictures in a conversation, more than {MAX_PLACES}"
    for place in places:
        if not 0 <= place.turn < len(questions):
            return "a picture has its place in a question that is not there"
        if not 0 <= place.position <= len(questions[place.turn]):
            return "a picture has its place behind the end of its text"
        if not 0 <= place.picture < pictures:
            return f"a place names picture {place.picture}, of {pictures}"
    spots = [place[:2] for place in places]
    if spots != sorted(spots):
        return "the places of pictures are not in reading order"
    if len({place.picture for place in places}) < pictures:
        return "a picture has no place, while others have"
    return None


def needed(places: Sequence[Place], questions: Sequence[str]) -> Places:
    """The places of a question as it has to be asked: none where they change nothing.

    Text between two pictures tells which is which, and so does a picture that comes again. One
    run of different pictures has nothing in it that could be parted, so it stands before the
    first text, where its visual tokens are computed once for all questions.

    Args:
        places: in reading order; pictures are numbered by their first appearance.
        questions: texts of all questions, oldest first.
    """
    once = len({place.picture for place in places}) == len(places)
    parted = any(
        one.turn != other.turn or questions[one.turn][one.position : other.position].strip()
        for one, other in itertools.pairwise(places)
    )
    return tuple(places) if parted or not once else ()


def joined(parts: Iterable[str | int]) -> tuple[str, Spots]:
    """A text out of its pieces, and where between them pictures stand.

    Args:
        parts: texts, joined as they are, and numbers of pictures.
    """
    text, spots = "", []
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            spots.append((len(text), part))
    return text, tuple(spots)


def split(text: str, spots: Iterable[tuple[int, int]]) -> list[str | int]:
    """A text in its pieces, with the numbers of the pictures between them; undoes `joined`."""
    parts: list[str | int] = []
    begin = 0
    for position, picture in spots:
        if position > begin:
            parts.append(text[begin:position])
        parts.append(picture)
        begin = position
    return [*parts, text[begin:]] if begin < len(text) else parts


def spots_of(places: Iterable[Place], turn: int) -> Spots:
    """The places within one question's text."""
    return tuple((place.position, place.picture) for place in places if place.turn == turn)
