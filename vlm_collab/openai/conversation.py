"""Conversations and questions about pictures, as parsed from a request of either API."""

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
"""Most earlier questions of a conversation, as in `Ask.history`."""

_MAX_URL_CHARS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """Bounds on one request.

    Attributes:
        max_body_bytes: most bytes of the body.
        max_pictures: most different pictures in the whole conversation.
        max_picture_bytes: most bytes of each picture, decoded from its data URL.
    """

    max_body_bytes: int = 64 * 2**20
    max_pictures: int = MAX_PICTURES
    max_picture_bytes: int = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Url:
    """The address of a picture that has to be fetched."""

    url: str


PictureSource: TypeAlias = bytes | Url


class Role(enum.Enum):
    """Author of a line of a conversation. System and developer texts count as the user's."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The texts of a conversation and its pictures.

    Attributes:
        lines: (role, text) of each text, oldest first.
        pictures: each different picture once, in order of appearance: the file's bytes or its
            address.
        params: path of each picture in the request.
        picture_places: positions of pictures, in reading order: (line, position in its text,
            picture). A picture at position 0 may precede a line that is still to come.
    """

    lines: tuple[tuple[Role, str], ...] = ()
    pictures: tuple[PictureSource, ...] = ()
    params: tuple[str, ...] = ()
    picture_places: Places = ()

    @classmethod
    def message(
        cls, role: Role, parts: Iterable[str | tuple[PictureSource, str]], gap: str = "\n"
    ) -> Conversation:
        """Make a conversation of one message.

        Args:
            role: author of the message.
            parts: texts, and pictures with their params, in order.
            gap: separator between two texts.
        """
        texts: list[str] = []
        found: dict[PictureSource, str] = {}
        numbers: dict[PictureSource, int] = {}
        places: list[Place] = []
        end = 0  # length of the joined texts so far
        for part in parts:
            if isinstance(part, str):
                end += len(part) + (len(gap) if texts else 0)
                texts.append(part)
                continue
            picture, param = part
            found.setdefault(picture, param)
            number = numbers.setdefault(picture, len(numbers))
            places.append(Place(0, end, number))
        lines = ((role, gap.join(texts)),) if texts else ()
        return cls(lines, tuple(found), tuple(found.values()), tuple(places))

    @classmethod
    def joined(cls, parts: Iterable[Conversation]) -> Conversation:
        """Join conversations. A picture of several is kept once, with all its places."""
        lines: list[tuple[Role, str]] = []
        found: dict[PictureSource, str] = {}
        numbers: dict[PictureSource, int] = {}
        places: list[Place] = []
        for part in parts:
            for picture, param in zip(part.pictures, part.params, strict=True):
                found.setdefault(picture, param)
                numbers.setdefault(picture, len(numbers))
            for line, position, picture_number in part.picture_places:
                number = numbers[part.pictures[picture_number]]
                places.append(Place(len(lines) + line, position, number))
            lines += part.lines
        return cls(tuple(lines), tuple(found), tuple(found.values()), tuple(places))

    def with_answer(self, text: str) -> Conversation:
        """The conversation with an answer at its end."""
        lines = (*self.lines, (Role.ASSISTANT, text))
        return Conversation(lines, self.pictures, self.params, self.picture_places)

    def with_fetched(self, contents: Mapping[Url, bytes]) -> Conversation:
        """The conversation with each address replaced by its picture; equal pictures become one."""
        found: dict[PictureSource, str] = {}
        sources: list[PictureSource] = []
        for picture, param in zip(self.pictures, self.params, strict=True):
            if isinstance(picture, Url):
                picture = contents.get(picture, picture)
            found.setdefault(picture, param)
            sources.append(picture)
        numbers = {picture: number for number, picture in enumerate(found)}
        places = tuple(
            one._replace(picture=numbers[sources[one.picture]]) for one in self.picture_places
        )
        return Conversation(self.lines, tuple(found), tuple(found.values()), places)

    def turns(self) -> tuple[tuple[tuple[str, str], ...], str, Places]:
        """Split the conversation into questions and answers.

        Consecutive texts of one side are joined with line breaks. An answer without a question
        before it gets an empty question.

        Returns:
            The (question, answer) pairs, the open question, and the places of the pictures in the
            questions.
        """
        history: list[tuple[str, str]] = []
        questions: list[str] = []
        answers: list[str] = []
        places: list[Place] = []
        left = deque(self.picture_places)
        size = 0  # characters of the joined question
        for line, (role, text) in enumerate(self.lines):
            if role is Role.ASSISTANT:
                # Pictures without a text after them come at the end of the text before.
                while left and left[0].turn <= line:
                    places.append(Place(len(history), size, left.popleft().picture))
                answers.append(text)
                continue
            if answers:
                history.append(("\n".join(questions), "\n".join(answers)))
                questions, answers, size = [], [], 0
            begin = size + len("\n") if questions else 0
            questions.append(text)
            size = begin + len(text)
            while left and left[0].turn <= line:
                _, position, picture = left.popleft()
                places.append(Place(len(history), begin + position, picture))
        if answers:
            history.append(("\n".join(questions), "\n".join(answers)))
            questions, size = [], 0
        places += [Place(len(history), size, one.picture) for one in left]
        return tuple(history), "\n".join(questions), tuple(places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A question parsed from a request of either API.

    Attributes:
        model: name of the model in the request; None if there is none.
        pictures: the different pictures of the whole conversation, in order of appearance: the
            file's bytes from a data URL, or a `Url`. Empty for a request about text alone.
        picture_params: path of each picture in the request, for errors about it.
        history: (question, answer) pairs, oldest first.
        question: the open question. System and developer texts are joined to the user's text
            after them with a line break.
        question_param: parameter with the question, for errors about it.
        options: options of the question, with `tokens` for logprobs; the caller sets `stream`.
        stream: stream the answer.
        include_usage: end a streamed chat completion with its usage.
        sources: sizes (width, height) in px of the originals, if the pictures are smaller views
            of them (`vlm_collab.sources`); empty if the pictures are originals.
        ignored: fields without effect (see `vlm_collab.openai.unsupported`).
        places: places of pictures in the texts, if needed; see `needed_places`.
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
    """Decode a picture from a data URL, or return a `Url` for one that has to be fetched.

    The length is checked before anything is decoded. The media type in the URL is ignored:
    clients often write `image/jpeg` for everything, and the content shows its format.

    Raises:
        ApiError: neither a data URL nor http(s), too large, or not base64.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        if len(url) > _MAX_URL_CHARS:
            raise refuse(param, f"{param}: the address has more than {_MAX_URL_CHARS} characters")
        return Url(url)
    if scheme != "data":
        raise refuse(param, f"{param} must be a data URL: data:image/jpeg;base64,…")
    head, comma, encoded = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refuse(param, f"{param}: a data URL must be base64: data:image/jpeg;base64,…")
    if len(encoded) // 4 * 3 > limits.max_picture_bytes + 3:
        mib = limits.max_picture_bytes / 2**20
        raise refuse(
            param, f"{param}: the picture has more than {mib:g} MiB", "image_too_large", status=413
        )
    try:
        # MIME allows line breaks, and some clients send them.
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise refuse(param, f"{param}: the base64 data is broken", "invalid_image") from None
    if not data:
        raise refuse(param, f"{param}: the picture is empty", "invalid_image")
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
    """Make a `Query` from a conversation, and check its pictures, places and turns.

    Args:
        conversation: the whole conversation.
        param: the parameter that has it in the request.

    Raises:
        ApiError: too many pictures, places or turns, or there is no question.
    """
    history, question, places = conversation.turns()
    count = len(conversation.pictures)
    if count > limits.max_pictures:
        raise refuse(
            conversation.params[limits.max_pictures],
            f"the conversation has {count} different pictures; at most {limits.max_pictures} are "
            "allowed",
            "too_many_images",
        )
    if len(places) > MAX_PLACES:
        text = f"the pictures have {len(places)} places; at most {MAX_PLACES} are allowed"
        raise refuse(param, text, "too_many_images")
    if len(history) > MAX_TURNS:
        raise refuse(param, f"the conversation has more than {MAX_TURNS} answers", "too_large")
    if not all(earlier.strip() for earlier, _ in history):
        why = "each answer must come after a text of the user"
        raise refuse(param, f"{param}: {why}", "invalid_question")
    if not question.strip():
        ends = conversation.lines and conversation.lines[-1][0] is Role.ASSISTANT
        why = "the last message must come from the user" if ends else "there is no question"
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
        places=needed_places(places, (*(earlier for earlier, _ in history), question)),
    )
