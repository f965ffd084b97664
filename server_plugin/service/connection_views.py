"""The pictures of a WebSocket connection: views that come with questions, and regions."""

from __future__ import annotations

import asyncio
import hashlib

from PIL.Image import Image

from server_plugin.service.answering import Refused
from server_plugin.service.state import ServiceState
from server_plugin.service.view_store import Lease, ViewNotHeldError
from vlm_collab.errors import ErrorCode, ImageError, ImageTooLargeError
from vlm_collab.geometry import Size
from vlm_collab.pictures import images
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Ask


class ConnectionViews:
    """One client's views in the view store, over one connection.

    Args:
        state: has the view store.
        codecs: image formats that the client and the server have in common, best first.
        resume: key of an earlier session to continue; empty for a new one.
    """

    def __init__(self, state: ServiceState, codecs: tuple[Codec, ...], resume: bytes) -> None:
        self.codecs = codecs
        self._store = state.views
        self._view_size = state.engine.backend.info.view
        self._session = self._store.enter(resume)

    @property
    def key(self) -> bytes:
        """Key with which the client can resume the session."""
        return self._session.key

    def leave(self) -> None:
        """Note that the connection has ended; its views stay for a while."""
        self._store.leave(self._session)

    def lease(self, ask: Ask) -> Lease:
        """Hold the view that a question brings or refers to.

        Raises:
            Refused: a picture cannot be used, or the view is not held.
        """
        pictures = 1 + len(ask.more)
        views = [ask.view, *(picture.view for picture in ask.more)]
        sent = [view for view in views if view is not None]
        if len(sent) == pictures:
            self._add(ask.view_id, sent)
        elif sent:
            raise Refused(ErrorCode.BAD_IMAGE, "some of the question's views are missing")
        try:
            # The lease starts here: other views must not displace this one while the question
            # waits for its turn.
            return self._store.lease(self._session, ask.view_id, pictures)
        except ViewNotHeldError:
            text = "this view is not held; send it again"
            raise Refused(ErrorCode.VIEW_GONE, text, 0.0) from None

    async def decode(self, data: bytes, largest: Size) -> Image:
        """Decode a picture that has no more pixels than `largest`.

        Raises:
            ImageError: it is too large or broken, or its format is not among `codecs`.
        """
        return await asyncio.to_thread(
            images.decode,
            data,
            codecs=frozenset(self.codecs),
            max_pixels=largest.width * largest.height,
        )

    def _add(self, view_id: int, views: list[bytes]) -> None:
        """Check the views' headers; they are decoded when their question's turn comes."""
        digest = hashlib.blake2b(digest_size=8)
        for data in views:
            self._check(data)
            digest.update(data)

        async def decode() -> list[Image]:
            return [await self.decode(data, self._view_size) for data in views]

        self._store.add(
            self._session,
            view_id,
            digest.hexdigest(),
            sum(map(len, views)),
            decode,
            pictures=len(views),
        )

    def _check(self, data: bytes) -> None:
        expected = self._view_size
        try:
            header = images.read_header(
                data, codecs=frozenset(self.codecs), max_pixels=expected.width * expected.height
            )
        except ImageTooLargeError as error:
            raise Refused(ErrorCode.TOO_LARGE, str(error)) from error
        except ImageError as error:
            raise Refused(ErrorCode.BAD_IMAGE, str(error)) from error
        if (header.width, header.height) != expected:
            raise Refused(
                ErrorCode.BAD_IMAGE,
                f"the view must have {expected.width} × {expected.height} px, "
                f"not {header.width} × {header.height}",
            )
