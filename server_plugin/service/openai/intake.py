"""From a parsed request to a pending question: its client, its pictures, and its acceptance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from PIL.Image import Image
from starlette.requests import HTTPConnection

from server_plugin.engines.two_stage import RegionNeed, RegionUnavailableError
from server_plugin.service.answering import QuestionAnswerer, Refused, request_of
from server_plugin.service.openai.pending import PendingQuestion
from server_plugin.service.openai.reply import error_of
from server_plugin.service.openai.uploads import (
    DecodingPool,
    HeldView,
    UploadedPicture,
    UploadedViews,
)
from server_plugin.service.state import ServiceState
from vlm_collab.errors import ErrorCode, ImageError
from vlm_collab.geometry import Size
from vlm_collab.openai import ApiError, PictureSource, Query, Url, WireLimits, api_error, refuse
from vlm_collab.protocol.messages import Fallback

T = TypeVar("T")

_SMALL_BYTES = 2**18
"""Largest request that is parsed on the event loop. Parsing it, with its pictures decoded from
base64 and hashed, takes a millisecond or two."""


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Who sends a request.

    Attributes:
        tenant: owner of kept pictures and responses: everyone with the same key.
        session: turns at the model alternate between sessions.
    """

    tenant: bytes
    session: Hashable

    @classmethod
    def from_request(cls, request: HTTPConnection) -> ClientIdentity:
        """Identify a client by its key and address."""
        key = request.headers.get("authorization", "")
        tenant = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return cls(tenant, ("http", tenant, request.client.host if request.client else ""))


@dataclass(frozen=True, slots=True)
class QuestionPictures:
    """The pictures of a question.

    Attributes:
        originals: as they were sent.
        sources: sizes of what they show, in px.
        sent_bytes: bytes of those that came with this request.
    """

    originals: tuple[UploadedPicture, ...]
    sources: tuple[Size, ...]
    sent_bytes: int = 0

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the originals; None if some pictures are only views of originals elsewhere."""
        all_original = all(map(_is_original, self.originals, self.sources))
        return sum(len(one.data) for one in self.originals) if all_original else None


def _is_original(picture: UploadedPicture, source: Size) -> bool:
    return picture.size == source


class QuestionIntake:
    """Accepts the questions of requests, and keeps track of them until they end.

    Args:
        state: see `ServiceState`.
        answerer: runs the engine.

    Attributes:
        model: the name under which clients know the model.
        target: size to which regions are reduced, in px.
        wire_limits: bounds on what is parsed of a request.
        decoding: decodes pictures.
    """

    def __init__(self, state: ServiceState, answerer: QuestionAnswerer) -> None:
        self._state, self._answerer = state, answerer
        limits, info = state.config.openai, state.engine.backend.info
        self.model = info.name
        self.target = state.engine.target
        self.wire_limits = WireLimits(
            max_body_bytes=limits.max_body_bytes, max_picture_bytes=limits.max_body_bytes
        )
        self.decoding = DecodingPool(limits)
        self._max_pixels = limits.max_picture_pixels
        self._views = UploadedViews(
            state.views,
            self.decoding,
            info.view,
            info.fit,
            state.config.limits.max_sessions,
        )
        self._questions: set[PendingQuestion] = set()

    def shorten_region_waits(self, patience_s: float) -> None:
        """Wait at most `patience_s` for regions that clients were asked for."""
        for question in self._questions:
            question.shorten_region_wait(patience_s)

    def shut_down(self) -> None:
        """End all questions, with first answers where there are some."""
        for question in list(self._questions):
            question.shut_down()

    def close(self) -> None:
        """Decode no more pictures."""
        self.decoding.close()

    async def parse(self, request_bytes: int, parse: Callable[[], T]) -> T:
        """Run `parse`, which parses a request; on the event loop only if the request is small."""
        return parse() if request_bytes <= _SMALL_BYTES else await self.decoding.run(parse)

    def check_pictures(
        self, query: Query, known: Mapping[PictureSource, tuple[UploadedPicture, Size]]
    ) -> QuestionPictures:
        """Check a question's pictures. Hashes them, so not for the event loop.

        Args:
            known: pictures that came with earlier requests, and the sizes of what they show.

        Raises:
            ApiError: one cannot be used.
        """
        originals, sources, sent_bytes = [], [], 0
        for data, param in zip(query.pictures, query.picture_params, strict=True):
            if data in known:
                original, source = known[data]
            else:
                original = self.check_picture(data, param)
                source = original.size
                sent_bytes += len(original.data)
            originals.append(original)
            sources.append(source)
        given = tuple(Size(*source) for source in query.sources)
        return QuestionPictures(tuple(originals), given or tuple(sources), sent_bytes)

    def check_picture(self, data: PictureSource, param: str) -> UploadedPicture:
        """Check one picture of a request. Hashes it, as `check_pictures` does.

        Raises:
            ApiError: it cannot be used, or would have to be fetched.
        """
        if isinstance(data, Url):
            text = f"{param}: this server fetches no pictures; send a data URL"
            raise refuse(param, text, "unsupported_image_url")
        try:
            return UploadedPicture.checked(data, self._max_pixels)
        except ImageError as error:
            raise api_error(error, param=param) from error

    def accept(
        self,
        client: ClientIdentity,
        query: Query,
        pictures: QuestionPictures,
        *,
        client_crops: bool,
    ) -> PendingQuestion:
        """Accept a question, and start to answer it.

        Args:
            client_crops: the client cuts regions itself.

        Raises:
            ApiError: it is refused before anything is computed.
        """

        async def hold_view() -> HeldView:
            return await self._views.hold(client.tenant, pictures.originals, pictures.sources)

        async def crop(need: RegionNeed) -> Image:
            original = pictures.originals[need.picture]
            if not _is_original(original, pictures.sources[need.picture]):
                raise RegionUnavailableError(Fallback.DECLINED)  # only the client has the original
            return await self.decoding.run(lambda: original.region(need.box, self.target))

        options = msgspec.structs.replace(query.options, stream=query.stream)
        try:
            question = PendingQuestion(
                self._state,
                self._answerer,
                request_of(query.question, query.history, query.places, options),
                options,
                session=client.session,
                hold_view=hold_view if pictures.originals else None,
                sources=pictures.sources,
                crop=None if client_crops else crop,
                may_wait=self._may_wait,
            )
        except Refused as refused:
            raise refusal_error(refused, query) from refused
        self._questions.add(question)
        question.on_end(lambda: self._questions.discard(question))
        return question

    def _may_wait(self) -> bool:
        """Whether one more question may wait for its client's region.

        Clients that may never come back hold at most half of the service's views and questions;
        beyond that, questions end with their first answers.
        """
        limits = self._state.config.limits
        waiting = [each.waiting for each in self._questions if each.waiting]
        nbytes = sum(waiting) * self._state.engine.backend.info.view_bytes
        return not waiting or (
            nbytes < limits.max_view_bytes / 2 and len(waiting) < limits.max_questions / 2
        )


def refusal_error(refused: Refused, query: Query | None = None) -> ApiError:
    """A refusal in OpenAI's form, with the parameter at fault as far as it is known."""
    param = None
    if query is not None and refused.code is ErrorCode.BAD_QUESTION:
        param = query.question_param
    if query is not None and refused.code is ErrorCode.BAD_IMAGE and len(query.pictures) == 1:
        param = query.picture_params[0]
    return error_of(refused, param)
