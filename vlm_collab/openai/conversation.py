"""What a request comes to: a question about pictures, whichever of the two APIs it came by."""

from __future__ import annotations

import base64
import binascii
import enum
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vlm_collab.openai.errors import refuse
from vlm_collab.protocol.image_positions import MAX_PLACES, Place, Places, needed_places
from vlm_collab.protocol.messages import MAX_PICTURES, Options

MAX_TURNS = 256
"""Earlier questions of a conversation, as many as `Ask.history` holds."""

_MAX_URL_CHARS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """Bounds on one request.

    Attributes:
        max_body_bytes: all of it.
        max_pictures: different pictures in the whole conversation.
        max_picture_bytes: each picture, decoded from its data URL.
    """

    max_body_bytes: int = 64 * 2**20
    max_pictures: int = MAX_PICTURES
    max_picture_bytes: int = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Url:
    """A picture that would have to be fetched."""

    url: str


PictureSource: TypeAlias = bytes | Url


class Role(enum.Enum):
    """Whose words a line of a conversation are; system and developer texts are the user's."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said, and the pictures it is about.

    Attributes:
        lines: (role, text), oldest first.
        pictures: in order of appearance, each once: the file's bytes, or where it is.
        params: where in the request each picture was.
        shown: where pictures stand, in reading order: (line, position in its text, picture). One
            at position 0 may stand before a line that is still to come.
    """

    lines: tuple[tuple[Role, str], ...] = ()
    pictures: tuple[PictureSource, ...] = ()
    params: tuple[str, ...] = ()
    shown: Places = ()

    @classmethod
    def message(
        cls, role: Role, parts: Iterable[str | tuple[PictureSource, str]], gap: str = "\n"
    ) -> Conversation:
        """One message.

        Args:
            role: whose.
            parts: texts, and pictures with their params, in order.
            gap: what stands between two texts.
        """
        texts: list[str] = []
        found: dict[PictureSource, str] = {}
        numbers: dict[PictureSource, int] = {}
        shown: list[Place] = []
        end = 0  # of the texts so far, joined
        for part in parts:
            if isinstance(part, str):
                end += len(part) + (len(gap) if texts else 0)
                texts.append(part)
                continue
            picture, param = part
            found.setdefault(picture, param)
            number = numbers.setdefault(picture, len(numbers))
            shown.append(Place(0, end, number))
        lines = ((role, gap.join(texts)),) if texts else ()
        return cls(lines, tuple(found), tuple(found.values()), tuple(shown))

    @classmethod
    def joined(cls, parts: Iterable[Conversation]) -> Conversation:
        """Several, one after the other; a picture that is in two of them is kept once, and
        stands where it stood in both."""
        lines: list[tuple[Role, str]] = []
        found: dict[PictureSource, str] = {}
        numbers: dict[PictureSource, int] = {}
        shown: list[Place] = []
        for part in parts:
            for picture, param in zip(part.pictures, part.params, strict=True):
                found.setdefault(picture, param)
                numbers.setdefault(picture, len(numbers))
            for line, position, picture_number in part.shown:
                number = numbers[part.pictures[picture_number]]
                shown.append(Place(len(lines) + line, position, number))
            lines += part.lines
        return cls(tuple(lines), tuple(found), tuple(found.values()), tuple(shown))

    def answered(self, text: str) -> Conversation:
        """With the answer at its end."""
        lines = (*self.lines, (Role.ASSISTANT, text))
        return Conversation(lines, self.pictures, self.params, self.shown)

    def fetched(self, contents: Mapping[Url, bytes]) -> Conversation:
        """With pictures instead of their addresses; one that turns out to be there already goes."""
        found: dict[PictureSource, str] = {}
        there: list[PictureSource] = []
        for picture, param in zip(self.pictures, self.params, strict=True):
            if isinstance(picture, Url):
                picture = contents.get(picture, picture)
            found.setdefault(picture, param)
            there.append(picture)
        numbers = {picture: number for number, picture in enumerate(found)}
        shown = tuple(one._replace(picture=numbers[there[one.picture]]) for one in self.shown)
        return Conversation(self.lines, tuple(found), tuple(found.values()), shown)

    def turns(self) -> tuple[tuple[tuple[str, str], ...], str, Places]:
        """The conversation as (question, answer) pairs, the question that is open, and where the
        pictures stand in the questions.

        What one side says in several messages in a row is one text, with a line break between
        them. An answer that no question came before has the empty one.
        """
        history: list[tuple[str, str]] = []
        asked: list[str] = []
        answers: list[str] = []
        places: list[Place] = []
        shown = deque(self.shown)
        size = 0  # characters of what is asked, joined
        for line, (role, text) in enumerate(self.lines):
            if role is Role.ASSISTANT:
                # What the user showed last without a word stands behind the words before.
                while shown and shown[0].turn <= line:
                    places.append(Place(len(history), size, shown.popleft().picture))
                answers.append(text)
                continue
            if answers:
                history.append(("\n".join(asked), "\n".join(answers)))
                asked, answers, size = [], [], 0
            begin = size + len("\n") if asked else 0
            asked.append(text)
            size = begin + len(text)
            while shown and shown[0].turn <= line:
                _, position, picture = shown.popleft()
                places.append(Place(len(history), begin + position, picture))
        if answers:
            history.append(("\n".join(asked), "\n".join(answers)))
            asked, size = [], 0
        places += [Place(len(history), size, one.picture) for one in shown]
        return tuple(history), "\n".join(asked), tuple(places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A question, ready to be asked.

    Attributes:
        model: the name that the client wants; None if it named none.
        pictures: over the whole conversation, in order of appearance, each once: the file's
            bytes from a data URL, or a `Url`. Empty for a request about text alone.
        picture_params: where in the request each picture was, for errors about it.
        history: (question, answer) pairs, oldest first.
        question: what is asked now. System and developer texts stand before the user's text
            that follows them, with a line break between.
        question_param: where the question was, for errors about it.
        options: wishes, `tokens` for logprobs among them; `stream` is left to the caller.
        stream: send the answer as it grows.
        include_usage: end a streamed chat completion with its usage.
        sources: sizes (width, height) of the originals of which the pictures are smaller views,
            in px; empty for pictures that are originals themselves. From `vlm_collab.sources`.
        ignored: what of the request has no effect (see `vlm_collab.openai.unsupported`).
        places: where pictures stand in the texts, where that matters; see `places.needed`.
    """

    model: str | None
    pictures: tuple[PictureSource, ...]
    picture_params: tuple[str, ...]
    history: tuple[tuple[str, str], ...]
    question: str
    question_param: str
    options: Options
    stream: bool = False
    include_usage: bool = False
    sources: tuple[tuple[int, int], ...] = ()
    ignored: tuple[str, ...] = ()
    places: Places = ()


def read_picture(url: str, param: str, limits: WireLimits) -> PictureSource:
    """A picture from a data URL, or a `Url` for one that would have to be fetched.

    The length is checked before anything is decoded. What the URL says of the format is not
    looked at: clients often say `image/jpeg` of everything, and the content tells by itself.

    Raises:
        ApiError: no such URL, too large, or not base64.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        if len(url) > _MAX_URL_CHARS:
            raise refuse(param, f"{param}: an address of more than {_MAX_URL_CHARS} characters")
        return Url(url)
    if scheme != "data":
        raise refuse(param, f"{param} must be a data URL: data:image/jpeg;base64,…")
    head, comma, encoded = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refuse(param, f"{param}: a data URL must be base64: data:image/jpeg;base64,…")
    if len(encoded) // 4 * 3 > limits.max_picture_bytes + 3:
        mib = limits.max_picture_bytes / 2**20
        raise refuse(
            param, f"{param}: a picture of more than {mib:g} MiB", "image_too_large", status=413
        )
    try:
        # Line breaks are allowed in MIME, and some clients make them.
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise refuse(param, f"{param}: broken base64", "invalid_image") from None
    if not data:
        raise refuse(param, f"{param}: an empty picture", "invalid_image")
    return data


def make_query(
    conversation: Conversation,
    *,
    model: str | None,
    param: str,
    options: Options,
    limits: WireLimits,
    stream: bool = False,
    include_usage: bool = False,
    sources: Iterable[tuple[int, int]] = (),
    ignored: tuple[str, ...] = (),
) -> Query:
    """A conversation as a question; checks what only the whole of it shows.

    Args:
        conversation: all of it.
        param: the parameter that it came in.

    Raises:
        ApiError: too many pictures or turns, or nothing is asked.
    """
    history, question, places = conversation.turns()
    count = len(conversation.pictures)
    if count > limits.max_pictures:
        raise refuse(
            conversation.params[limits.max_pictures],
            f"{count} different pictures in a conversation, more than {limits.max_pictures}",
            "too_many_images",
        )
    if len(places) > MAX_PLACES:
        text = f"pictures at {len(places)} places of a conversation, more than {MAX_PLACES}"
        raise refuse(param, text, "too_many_images")
    if len(history) > MAX_TURNS:
        raise refuse(param, f"a conversation of more than {MAX_TURNS} turns", "too_large")
    if not all(asked.strip() for asked, _ in history):
        why = "before each answer there must be a text of the user's"
        raise refuse(param, f"{param}: {why}", "invalid_question")
    if not question.strip():
        ends = conversation.lines and conversation.lines[-1][0] is Role.ASSISTANT
        why = "the last message must be the user's" if ends else "there is no question"
        raise refuse(param, f"{param}: {why}", "invalid_question")
    sizes = tuple(sources)
    if sizes and len(sizes) != count:
        raise refuse(
            "vlm_collab.sources",
            f"vlm_collab.sources has {len(sizes)} sizes for {count} pictures",
        )
    return Query(
        model=model,
        pictures=conversation.pictures,
        picture_params=conversation.params,
        history=history,
        question=question,
        question_param=param,
        options=options,
        stream=stream,
        include_usage=include_usage,
        sources=sizes,
        ignored=ignored,
        places=needed_places(places, (*(asked for asked, _ in history), question)),
    )
