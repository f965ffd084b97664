"""Whole pictures from clients that cannot crop: checked, made into views, cropped here.

The bytes are a stranger's, so their headers are checked before anything is decompressed, and
what no decoder needs is left out of them (`vlm_collab.pictures.headers`). Colour profiles are
ignored, as everywhere on the server.

Views are made from the original's pixels as the edge makes them, without its JPEG in between. An
answer can therefore differ from the one that an edge gets, as it can between two qualities.
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
from server_plugin.service.view_store import ClientSession, Lease, ViewGoneLocallyError, ViewStore
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import read_header
from vlm_collab.pictures.source_image import SourceImage

T = TypeVar("T")

_MOST_STRETCHED = 4
"""How many times longer a side may become where a client changed its picture's aspect."""


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """A picture as a client sent it.

    Attributes:
        data: the encoded picture.
        digest: names its content.
        size: of the upright picture, in px.
    """

    data: bytes
    digest: bytes
    size: Size

    @classmethod
    def checked(cls, data: bytes, max_pixels: int) -> Original:
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
            fit: how the picture is brought to it.
            source: size of what the picture shows, in px. The client may have reduced that, and
                changed its aspect doing so.

        Raises:
            ImageError: the data are broken.
        """
        picture = self._opened()
        if fit is not Fit.STRETCH and not _alike(self.size, source):
            picture = SourceImage.from_pil(_reshaped(picture, source))
        return picture.view(side, fit)

    def region(self, box: Box | None, target: Size) -> Image.Image:
        """A part at full resolution, or all of it, reduced to `target`. Decodes, as `view`."""
        return self._opened().region(box or Box(0, 0, *self.size), target)

    def _opened(self) -> SourceImage:
        return SourceImage.received(self.data, max_pixels=self.size.width * self.size.height)


def _alike(one: Size, other: Size) -> bool:
    """Whether a picture can be the other one reduced, but for rounding to whole pixels."""
    return abs(one.width * other.height - other.width * one.height) <= max(other)


def _reshaped(picture: SourceImage, source: Size) -> Image.Image:
    """The picture in the aspect of its source, with all that it shows, and not without bounds."""
    width, height = (own / other for own, other in zip(picture.size, source, strict=True))
    scale = min(max(width, height), _MOST_STRETCHED * min(width, height))
    whole = picture.region(Box(0, 0, *picture.size), picture.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    return whole.resize(size, Image.Resampling.BICUBIC)


class Workshop:
    """Decodes pictures off the event loop, a few at a time.

    On threads of its own: an allocator keeps what each thread once had, and a decoded picture is
    large. A thread cannot be stopped, so the place of a client that leaves is taken until its
    picture is done; else clients that come and go could have any number of them decoding.
    """

    def __init__(self, limits: OpenAiLimits) -> None:
        self._threads = ThreadPoolExecutor(limits.max_decoding, "pictures")

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Take no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Held:
    """A view that a question works on. To be closed."""

    def __init__(self, store: ViewStore, session: ClientSession, lease: Lease) -> None:
        self._store, self._session = store, session
        self.lease = lease
        self._open = True

    def close(self) -> None:
        """Let go; the view stays for a while. Safe to call twice."""
        if self._open:
            self._open = False
            self.lease.close()
            self._store.leave(self._session)


class Gallery:
    """Views by their pictures' content, so that a chat that sends its picture with every question
    has it computed once.

    Each set of pictures is a session of the view store, which forgets it some time after its
    last question. A view is found only by the tenant whose picture it was.

    Args:
        store: where views live.
        workshop: decodes the pictures.
        side, fit: of views.
        max_known: sets of pictures remembered.
    """

    def __init__(
        self, store: ViewStore, workshop: Workshop, side: Size, fit: Fit, max_known: int
    ) -> None:
        self._store, self._workshop = store, workshop
        self._side, self._fit = side, fit
        self._max_known = max_known
        self._sessions: OrderedDict[bytes, bytes] = OrderedDict()

    async def hold(
        self, tenant: bytes, originals: Sequence[Original], sources: Sequence[Size]
    ) -> Held:
        """The view of these pictures together; they are decoded if it is not there.

        Args:
            tenant: whose pictures they are.
            originals: one or more.
            sources: sizes of what they show, in px.

        Raises:
            ImageError: the data of one are broken.
        """
        name = hashlib.blake2b(tenant, digest_size=16)
        for original, source in zip(originals, sources, strict=True):
            name.update(original.digest + repr(tuple(source)).encode())
        held = self._held(name.digest(), len(originals))
        if held is not None:
            return held

        def made() -> list[Image.Image]:
            views: list[Image.Image] = []
            for original, source in zip(originals, sources, strict=True):
                try:
                    views.append(original.view(self._side, self._fit, source))
                except ImageError as error:
                    if len(originals) == 1:
                        raise
                    raise type(error)(f"picture {len(views) + 1}: {error}") from error
            return views

        views = await self._workshop.run(made)
        # Another question may have brought the same picture meanwhile.
        held = self._held(name.digest(), len(originals))
        return held or self._added(name.digest(), views)

    def _held(self, name: bytes, pictures: int) -> Held | None:
        key = self._sessions.get(name)
        if key is None:
            return None
        session = self._store.enter(key)
        self._remember(name, session)
        try:
            return Held(self._store, session, self._store.lease(session, 0, pictures))
        except ViewGoneLocallyError:
            self._store.leave(session)
            return None

    def _added(self, name: bytes, views: list[Image.Image]) -> Held:
        session = self._store.enter(self._sessions.get(name, b""))
        self._remember(name, session)
        waiting = [views]

        async def decoded() -> list[Image.Image]:
            return waiting.pop()  # once the backend has them, they are needed no more

        nbytes = len(views) * self._side.width * self._side.height * 3
        self._store.add(session, 0, name.hex(), nbytes, decoded, pictures=len(views))
        return Held(self._store, session, self._store.lease(session, 0, len(views)))

    def _remember(self, name: bytes, session: ClientSession) -> None:
        self._sessions[name] = session.key
        self._sessions.move_to_end(name)
        while len(self._sessions) > self._max_known:
            self._sessions.popitem(last=False)
