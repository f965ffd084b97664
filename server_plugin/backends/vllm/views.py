"""Global views as the vLLM backend keeps them: pixels, and the request for the generic row."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from PIL.Image import Image

from server_plugin.backends.base import Generation, View


@dataclass(frozen=True, slots=True)
class NamedPicture:
    """A picture as it is given to the engine.

    Attributes:
        image: RGB, as the checkpoint's image processor takes it.
        name: stands for the pixels, in vLLM's caches too.
    """

    image: Image
    name: str


@dataclass(slots=True, eq=False)
class VllmView:
    """A global view: its pixels, and its generic row once that was needed.

    Attributes:
        shown: the pictures, one or more; None after a release.
        pictures: how many.
        generic: the request that computes the generic row, or did.
    """

    shown: tuple[NamedPicture, ...] | None
    pictures: int = 1
    generic: asyncio.Task[Generation] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the pixels and the row, in bytes. vLLM's own caches have budgets of theirs."""
        pixels = sum(math.prod(picture.image.size) * 3 for picture in self.shown or ())
        generic = result_of(self.generic)
        return pixels + (0 if generic is None or generic.row is None else generic.row.nbytes)


def pictures_of(view: View) -> tuple[NamedPicture, ...]:
    assert isinstance(view, VllmView)
    if view.shown is None:
        raise RuntimeError("this view was released")
    return view.shown


def result_of(task: asyncio.Task[Generation] | None) -> Generation | None:
    """What a task came to, if it did."""
    if task is None or not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()
