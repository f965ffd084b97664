"""Questions out of requests: whose they are, what they show, and having them answered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
from PIL.Image import Image
from starlette.requests import HTTPConnection

from server_plugin.engines.two_stage import RegionNeed, RegionUnavailableError
from server_plugin.service.answering import Refused
from server_plugin.service.openai.pending import Question
from server_plugin.service.openai.reply import error_of
from server_plugin.service.openai.uploads import Gallery, Held, Original, Workshop
from vlm_collab.errors import ErrorCode, ImageError
from vlm_collab.geometry import Size
from vlm_collab.openai import ApiError, PictureSource, Query, Url, WireLimits, api_error, refuse
from vlm_collab.protocol.messages import Fallback

if TYPE_CHECKING:
    from server_plugin.service.asgi import Service


T = TypeVar("T")

_QUICK_BYTES = 2**18
"""A request of so many bytes is read, and its pictures decoded from base64 and hashed, in a
millisecond or two."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    Attributes:
        tenant: what is kept belongs to it: to everyone with the same key.
        session: between sessions, turns at the model alternate.
    """

    tenant: bytes
    session: Hashable

    @classmethod
    def of(cls, request: HTTPConnection) -> Client:
        """By the key and the address that a request comes with."""
        key = request.headers.get("authorization", "")
        tenant = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return cls(tenant, ("http", tenant, request.client.host if request.client else ""))


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a question.

    Attributes:
        originals: as they were sent.
        sources: sizes of what they show, in px.
        sent_bytes: of those that came with this request.
    """

    originals: tuple[Original, ...]
    sources: tuple[Size, ...]
    sent_bytes: int = 0

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the originals; None if some are elsewhere, and these are views of them."""
        whole = all(map(_is_whole, self.originals, self.sources))
        return sum(len(original.data) for original in self.originals) if whole else None


def _is_whole(original: Original, source: Size) -> bool:
    return original.size == source


class Asker:
    """Has questions answered by the service's engine.

    Args:
        service: whose engine answers.

    Attributes:
        model: the name that clients know it by.
        target: size to which regions are reduced, in px.
        wire: bounds on what is read out of a request.
        workshop: decodes pictures.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        limits, info = service.config.openai, service.engine.backend.info
        self.model = info.name
        self.target = service.engine.target
        self.wire = WireLimits(
            max_body_bytes=limits.max_body_bytes, max_picture_bytes=limits.max_body_bytes
        )
        self.workshop = Workshop(limits)
        self._max_pixels = limits.max_picture_pixels
        self._gallery = Gallery(
            service.views,
            self.workshop,
            info.view,
            info.fit,
            service.config.limits.max_sessions,
        )
        self._questions: set[Question] = set()

    def hurry(self, patience_s: float) -> None:
        """Wait so long at most for clients that were asked for a region."""
        for question in self._questions:
            question.hurry(patience_s)

    def shut_down(self) -> None:
        """End what is in flight, with first answers where there are some."""
        for question in list(self._questions):
            question.shut_down()

    def close(self) -> None:
        """Take no more questions."""
        self.workshop.close()

    async def read(self, request_bytes: int, work: Callable[[], T]) -> T:
        """What `work` makes of a request; on the event loop only if that is quick."""
        return work() if request_bytes <= _QUICK_BYTES else await self.workshop.run(work)

    def pictures(
        self, query: Query, known: Mapping[PictureSource, tuple[Original, Size]]
    ) -> Pictures:
        """Check a question's pictures. Hashes them, so not for the event loop.

        Args:
            known: those that came with earlier requests.

        Raises:
            ApiError: one cannot be used.
        """
        originals, sources, sent_bytes = [], [], 0
        for data, param in zip(query.pictures, query.picture_params, strict=True):
            if data in known:
                original, source = known[data]
            else:
                original = self.checked(data, param)
                source = original.size
                sent_bytes += len(original.data)
            originals.append(original)
            sources.append(source)
        stated = tuple(Size(*source) for source in query.sources)
        return Pictures(tuple(originals), stated or tuple(sources), sent_bytes)

    def checked(self, data: PictureSource, param: str) -> Original:
        """A picture out of a request. Hashes it, as `pictures` does.

        Raises:
            ApiError: it cannot be used, or would have to be fetched.
        """
        if isinstance(data, Url):
            text = f"{param}: this server fetches no pictures; send a data URL"
            raise refuse(param, text, "unsupported_image_url")
        try:
            return Original.checked(data, self._max_pixels)
        except ImageError as error:
            raise api_error(error, param=param) from error

    def ask(self, client: Client, query: Query, pictures: Pictures, *, remote: bool) -> Question:
        """Have a question answered.

        Args:
            remote: the client cuts regions itself.

        Raises:
            ApiError: it is refused before anything is computed.
        """

        async def hold() -> Held:
            return await self._gallery.hold(client.tenant, pictures.originals, pictures.sources)

        async def crop(need: RegionNeed) -> Image:
            original = pictures.originals[need.picture]
            if not _is_whole(original, pictures.sources[need.picture]):
                raise RegionUnavailableError(Fallback.DECLINED)  # the client has it, not we
            return await self.workshop.run(lambda: original.region(need.box, self.target))

        try:
            question = Question(
                self._service,
                client.session,
                query.question,
                query.history,
                msgspec.structs.replace(query.options, stream=query.stream),
                hold if pictures.originals else None,
                pictures.sources,
                None if remote else crop,
                self._may_wait,
                query.places,
            )
        except Refused as refused:
            raise told(refused, query) from refused
        self._questions.add(question)
        question.when_over(lambda: self._questions.discard(question))
        return question

    def _may_wait(self) -> bool:
        """Clients that may never come back hold at most half of the service's views and questions;
        beyond that, first answers stand."""
        limits = self._service.config.limits
        waiting = [each.waiting for each in self._questions if each.waiting]
        nbytes = sum(waiting) * self._service.engine.backend.info.view_bytes
        return not waiting or (
            nbytes < limits.max_view_bytes / 2 and len(waiting) < limits.max_questions / 2
        )


def told(refused: Refused, query: Query | None = None) -> ApiError:
    """Why a question was refused, with the parameter at fault as far as it is known."""
    param = None
    if query is not None and refused.code is ErrorCode.BAD_QUESTION:
        param = query.question_param
    if query is not None and refused.code is ErrorCode.BAD_IMAGE and len(query.pictures) == 1:
        param = query.picture_params[0]
    return error_of(refused, param)
