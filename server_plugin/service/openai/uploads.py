"""Whole pictures uploaded by clients that cannot crop: checked, made into views, cropped here.

The bytes are untrusted: their headers are checked before anything is decompressed, and data that
no decoder needs are left out (`vlm_collab.pictures.headers`). Colour profiles are ignored, as
everywhere on the server.

Views are made from the original's pixels as the edge makes them, but are not encoded as JPEG. An
answer can therefore differ from the one that an edge gets, as it can between two JPEG qualities.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from server_plugin.service.config import OpenAiLimits
from server_plugin.service.view_store import ClientSession, Lease, ViewNotHeldError, ViewStore
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import read_header
from vlm_collab.pictures.source_image import SourceImage

T = TypeVar("T")

_MOST_STRETCHED = 4
"""How many times longer a side may become when a picture's aspect ratio is restored."""


@dataclass(frozen=True, slots=True, eq=False)
class UploadedPicture:
    """A picture as a client sent it.

    Attributes:
        data: the encoded picture.
        digest: of its content.
        size: of the upright picture, in px.
    """

    data: bytes
    digest: bytes
    size: Size

    @classmethod
    def checked(cls, data: bytes, max_pixels: int) -> UploadedPicture:
        """Check a picture's header; nothing is decoded.

        Raises:
            ImageError: no picture, an animated one, too large, or a broken header.
        """
        header = read_header(data, max_pixels=max_pixels)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return cls(data, digest, Size(header.width, header.height))

    def view(self, side: Size, fit: Fit, source: Size) -> Image.Image:
        """The global view. Decodes; not for the event loop.

        Args:
            side: size of the view, in px.
            fit: how the picture is fitted to it.
            source: size of what the picture shows, in px. The client may have reduced it and
                changed its aspect ratio.

        Raises:
            ImageError: the data are broken.
        """
        picture = self._opened()
        if fit is not Fit.STRETCH and not _same_aspect(self.size, source):
            picture = SourceImage.from_pil(_reshaped(picture, source))
        return picture.view(side, fit)

    def region(self, box: Box | None, target: Size) -> Image.Image:
        """Return a part, or the whole for None, reduced from full resolution to `target`."""
        return self._opened().region(box or Box(0, 0, *self.size), target)

    def _opened(self) -> SourceImage:
        return SourceImage.received(self.data, max_pixels=self.size.width * self.size.height)


def _same_aspect(one: Size, other: Size) -> bool:
    """Whether two aspect ratios are equal, apart from rounding to whole pixels."""
    return abs(one.width * other.height - other.width * one.height) <= max(other)


def _reshaped(picture: SourceImage, source: Size) -> Image.Image:
    """The whole picture, resized to its source's aspect ratio; bounded by `_MOST_STRETCHED`."""
    width, height = (own / other for own, other in zip(picture.size, source, strict=True))
    scale = min(max(width, height), _MOST_STRETCHED * min(width, height))
    whole = picture.region(Box(0, 0, *picture.size), picture.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    return whole.resize(size, Image.Resampling.BICUBIC)


class DecodingPool:
    """Decodes pictures off the event loop, a few at a time.

    It has threads of its own, and few: an allocator keeps the memory that each thread once used,
    and a decoded picture is large. A thread cannot be stopped, so it stays busy with a picture
    whose client has left; otherwise clients that come and go could have any number decoded at once.
    """

    def __init__(self, limits: OpenAiLimits) -> None:
        self._threads = ThreadPoolExecutor(limits.max_decoding, "pictures")

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on one of the threads and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Take no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class HeldView:
    """A view that a question uses. It has to be closed."""

    def __init__(self, store: ViewStore, session: ClientSession, lease: Lease) -> None:
        self._store, self._session = store, session
        self.lease = lease
        self._open = True

    def close(self) -> None:
        """Release the view, which is kept for a while. Safe to call twice."""
        if self._open:
            self._open = False
            self.lease.close()
            self._store.leave(self._session)


class UploadedViews:
    """Views found by the content of their pictures.

    A chat that sends its picture with every question has its view computed once. Each set of
    pictures is a session of the view store, which forgets it some time after its last question.
    Only the tenant who sent the pictures finds their view.

    Args:
        store: keeps the views.
        decoding: decodes the pictures.
        side, fit: size of views in px, and how pictures are fitted to it.
        max_known: most sets of pictures remembered.
    """

    def __init__(
        self, store: ViewStore, decoding: DecodingPool, side: Size, fit: Fit, max_known: int
    ) -> None:
        self._store, self._decoding = store, decoding
        self._side, self._fit = side, fit
        self._max_known = max_known
        self._sessions: OrderedDict[bytes, bytes] = OrderedDict()

    async def hold(
        self, tenant: bytes, originals: Sequence[UploadedPicture], sources: Sequence[Size]
    ) -> HeldView:
        """Hold the view of these pictures; decode them if the view is not kept.

        Args:
            tenant: who sent them.
            originals: one or more.
            sources: sizes of what they show, in px.

        Raises:
            ImageError: the data of a picture are broken.
        """
        name = hashlib.blake2b(tenant, digest_size=16)
        for original, source in zip(originals, sources, strict=True):
            name.update(original.digest + repr(tuple(source)).encode())
        kept = self._hold_kept(name.digest(), len(originals))
        if kept is not None:
            return kept

        def make_views() -> list[Image.Image]:
            views: list[Image.Image] = []
            for original, source in zip(originals, sources, strict=True):
                try:
                    views.append(original.view(self._side, self._fit, source))
                except ImageError as error:
                    if len(originals) == 1:
                        raise
                    raise type(error)(f"picture {len(views) + 1}: {error}") from error
            return views

        views = await self._decoding.run(make_views)
        # Another question may have added the same view meanwhile.
        kept = self._hold_kept(name.digest(), len(originals))
        return kept or self._hold_new(name.digest(), views)

    def _hold_kept(self, name: bytes, pictures: int) -> HeldView | None:
        key = self._sessions.get(name)
        if key is None:
            return None
        session = self._store.enter(key)
        self._remember(name, session)
        try:
            return HeldView(self._store, session, self._store.lease(session, 0, pictures))
        except ViewNotHeldError:
            self._store.leave(session)
            return None

    def _hold_new(self, name: bytes, views: list[Image.Image]) -> HeldView:
        session = self._store.enter(self._sessions.get(name, b""))
        self._remember(name, session)
        waiting = [views]

        async def decoded() -> list[Image.Image]:
            return waiting.pop()  # the backend has them now, so their memory can be freed

        nbytes = len(views) * self._side.width * self._side.height * 3
        self._store.add(session, 0, name.hex(), nbytes, decoded, pictures=len(views))
        return HeldView(self._store, session, self._store.lease(session, 0, len(views)))

    def _remember(self, name: bytes, session: ClientSession) -> None:
        self._sessions[name] = session.key
        self._sessions.move_to_end(name)
        while len(self._sessions) > self._max_known:
            self._sessions.popitem(last=False)
