"""The async client."""

from __future__ import annotations

import asyncio
import math
import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, TypedDict, Unpack

from edge_client.answer import EdgeAnswer, TextSink
from edge_client.link.dial import DEFAULT_URL, Server
from edge_client.link.link import CODECS
from edge_client.link.question import QuestionDriver
from edge_client.link.reconnect import LinkKeeper
from edge_client.link.request import QuestionRequest, ViewState
from edge_client.picture import Picture, PictureCache, PictureLike
from edge_client.privacy.guard import open_guard
from edge_client.privacy.policy import PrivacyPolicy
from edge_client.retry import Retry
from vlm_collab.errors import CollabError, ConfigError, QuestionError
from vlm_collab.pictures.images import Codec
from vlm_collab.pictures.source_image import MAX_SOURCE_PIXELS
from vlm_collab.protocol.edge_session import EdgeLimits
from vlm_collab.protocol.image_positions import Place, join_parts, places_fault
from vlm_collab.protocol.messages import MAX_PICTURES, Options, PicturePlace, Turn, Welcome

DEFAULT_DEADLINE_S = 60.0

_Others = tuple[weakref.ref[Picture], ...]
"""A question's pictures after the first."""

Text: TypeAlias = str | Sequence[str | int]
"""A question, or a list of text pieces and picture indices."""

_MAX_CONCURRENT = 32  # a server's default limit for one connection


class ClientOptions(TypedDict, total=False):
    """Settings of a client besides the address; all have defaults.

    Attributes:
        token: bearer token.
        ca_file: PEM file of certificate authorities to trust instead of the system's.
        proxy: address of a proxy; proxy settings from the environment are ignored.
        connect_timeout_s: time for one attempt to connect, in s (10).
        ping_interval_s: how often a silent link is checked, in s (20).
        retry: attempts and pauses for reconnecting, and for sending a question again that lost
            its link.
        limits: what the server may request of the pictures on one connection.
        max_pixels: most pixels of a picture (200 million).
        view_codec: format of global views; by default the server's first choice.
        view_quality: JPEG or WebP quality of global views, 1 to 100 (90).
        policy: what may leave the device: a policy file or a loaded policy. None allows
            everything (see `docs/privacy.md`).
        camera: camera of the policy whose rules apply; None for its `default` entry.
        audit: file that lists every image that leaves; None for no log.
        decoder: threads that decode pictures. Each needs at least 4 bytes of memory per pixel.
            The caller shuts them down. None for those of `asyncio`.
    """

    token: str | None
    ca_file: str | Path | None
    proxy: str | None
    connect_timeout_s: float
    ping_interval_s: float
    retry: Retry
    limits: EdgeLimits
    max_pixels: int
    view_codec: Codec | None
    view_quality: int
    policy: PrivacyPolicy | str | os.PathLike[str] | None
    camera: str | None
    audit: str | os.PathLike[str] | None
    decoder: Executor | None


class EdgeClient:
    """Asks questions about pictures, many at the same time, over one connection.

    ::

        async with EdgeClient("ws://server:8765", token="…") as client:
            answer = await client.ask("photo.jpg", "What does the small sign say?")

    Connects on entering, and reconnects when a question needs a link and it is lost. Views that
    the server still has are not sent again.

    Args:
        url: `ws://host:port` or `wss://host:port`.
        options: see `ClientOptions`.

    Raises:
        ConfigError: a setting is invalid.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        server = Server(
            url=url,
            token=options.get("token"),
            ca_file=options.get("ca_file"),
            proxy=options.get("proxy"),
            connect_timeout_s=options.get("connect_timeout_s", 10.0),
            ping_interval_s=options.get("ping_interval_s", 20.0),
        )
        codec = options.get("view_codec")
        self._view_codecs = CODECS if codec is None else (codec,)
        self._view_quality = options.get("view_quality", 90)
        if not 1 <= self._view_quality <= 100:
            raise ConfigError(f"quality must be from 1 to 100, not {self._view_quality}")
        limits, retry = options.get("limits", EdgeLimits()), options.get("retry", Retry())
        self._keeper = LinkKeeper(server, limits, retry)
        self._pace = retry
        self._guard = open_guard(
            options.get("policy"), options.get("camera"), options.get("audit"), url
        )
        self._album = PictureCache(options.get("max_pixels", MAX_SOURCE_PIXELS))
        self._decoder = options.get("decoder")
        # Entries vanish with their pictures; view numbers are not reused.
        self._views: weakref.WeakKeyDictionary[Picture, dict[_Others, ViewState]] = (
            weakref.WeakKeyDictionary()
        )
        self._last_view_id = 0

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def connect(self) -> Welcome:
        """Connect, unless connected, and return the server's `Welcome`.

        Raises:
            LinkError: nothing answers there, or it is not a vlm-collab server.
            AuthenticationError: wrong token.
            RemoteProtocolError: the server speaks another version or another protocol.
        """
        return (await self._keeper.link()).welcome

    async def close(self) -> None:
        """Close the connection.

        Open questions end with their first answer if there is one, else with `LinkError`.
        """
        await self._keeper.close()

    async def ask(
        self,
        picture: PictureLike | Sequence[PictureLike],
        question: Text,
        *,
        history: Sequence[tuple[Text, str]] = (),
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        on_text: TextSink | None = None,
        options: Options | None = None,
    ) -> EdgeAnswer:
        """Ask a question about one or several pictures.

        If the server is unsure it asks for a region, which is cut from the original here.
        Whatever goes wrong after that, the first answer is returned and marked (`fallback`).
        Cancelling the task cancels the question at the server.

        Args:
            picture: a `Picture`, the path of one, or the content of its file; or a sequence of
                these, in the order in which the model sees them.
            question: the text; or a list of text pieces and picture indices (from 0) at their
                positions: `["Before: ", 0, " After: ", 1, " What changed?"]`. Pieces are joined
                without separators. Without indices, here and in the history, the pictures stand
                before the first text. With indices, each picture must occur at least once.
            history: earlier (question, answer) pairs, oldest first; questions as above.
            deadline_s: time for everything including connecting, in s; None for no limit. Until
                then a question that loses its link is asked again, at the pace of `Retry`.
            on_text: called with (stage, text so far) as the answer grows, and with each
                finished text. After a lost link the text starts from the beginning.
            options: settings of this question; None for the server's defaults.

        Raises:
            ImageError: the picture cannot be used.
            QuestionError: the question is empty, too long or not text.
            DeadlineError: no answer in time, not even a first one.
            PrivacyError: the policy does not allow the views, or it is a quiet hour.
            LinkError: the server cannot be reached, or was lost and did not come back in time.
            AuthenticationError: wrong token.
            ServerError: the server refused the question; it says why.
            ProtocolError: the server breaks the protocol.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise ConfigError(f"the deadline must be more than 0 s, not {deadline_s:g}")
        turns = tuple(_turn(*turn) for turn in history)
        text, places = _text_and_places(question)
        self._check(text, turns)
        # A path and the content of a file are sequences too.
        one = isinstance(picture, Picture | str | bytes | os.PathLike)
        sources: list[PictureLike] = [picture] if one else list(picture)  # type: ignore
        if not 1 <= len(sources) <= MAX_PICTURES:
            raise ConfigError(f"a question must have 1 to {MAX_PICTURES} pictures")
        all_places = enumerate((*(turn.places for turn in turns), places))
        positions = [Place(i, one.position, one.picture) for i, each in all_places for one in each]
        fault = places_fault(positions, (*(turn.question for turn in turns), text), len(sources))
        if fault is not None:
            raise ConfigError(fault)
        opened = [await asyncio.to_thread(self._open, source) for source in sources]
        request = QuestionRequest(
            pictures=tuple(opened),
            question=text,
            options=options,
            history=turns,
            places=places,
            view=self._view(opened),
            # The event loop's clock takes no infinite time.
            deadline_s=None if deadline_s == math.inf else deadline_s,
            on_text=on_text,
            view_codecs=self._view_codecs,
            view_quality=self._view_quality,
            guard=self._guard.question(text),
            pace=self._pace,
            decoder=self._decoder,
        )
        return await QuestionDriver(request, self._keeper).run()

    async def ask_many(
        self,
        items: Iterable[tuple[PictureLike, str]],
        *,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        options: Options | None = None,
    ) -> list[EdgeAnswer | CollabError]:
        """Ask many questions at the same time.

        A failed question does not affect the others: its error is returned in its place. At most
        32 questions run at the same time; the pictures of the others are not opened yet.

        Args:
            items: (picture, question) pairs.
            deadline_s: time for each question from when it starts, in s.
            options: settings of all questions.

        Returns:
            For each pair, in order, its answer or its error.
        """
        turns = asyncio.Semaphore(_MAX_CONCURRENT)

        async def one(picture: PictureLike, question: str) -> EdgeAnswer:
            async with turns:
                return await self.ask(picture, question, deadline_s=deadline_s, options=options)

        tasks = [one(picture, question) for picture, question in items]
        results: list[EdgeAnswer | CollabError] = []
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, CollabError):
                raise result  # a programming error, not a failed question
            results.append(result)
        return results

    def _open(self, source: PictureLike) -> Picture:
        return self._guard.masked(self._album.get(source))

    def _check(self, question: str, history: Iterable[Turn] = ()) -> None:
        if not question.strip():
            raise QuestionError("the question is empty")
        texts = [question, *(text for turn in history for text in (turn.question, turn.answer))]
        try:
            size_bytes = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError:
            raise QuestionError("the question contains bytes that are not UTF-8 text") from None
        link = self._keeper.current
        if link is not None and size_bytes > link.welcome.max_question_bytes:
            what = "question has" if len(texts) == 1 else "question and history have"
            raise QuestionError(
                f"the {what} {size_bytes} bytes; "
                f"the server allows {link.welcome.max_question_bytes}"
            )

    def _view(self, pictures: Sequence[Picture]) -> ViewState:
        views = self._views.setdefault(pictures[0], {})
        others = tuple(weakref.ref(picture) for picture in pictures[1:])
        if others not in views:
            self._last_view_id += 1
            views[others] = ViewState(self._last_view_id)
        return views[others]


def _text_and_places(text: Text) -> tuple[str, tuple[PicturePlace, ...]]:
    """Split a question into its text and the positions of pictures in it."""
    joined_text, positions = join_parts([text] if isinstance(text, str) else text)
    return joined_text, tuple(PicturePlace(*position) for position in positions)


def _turn(question: Text, answer: str) -> Turn:
    text, places = _text_and_places(question)
    return Turn(text, answer, places)
