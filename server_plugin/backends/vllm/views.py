"""Global views as the vLLM backend keeps them: pixels, and the request for the generic row."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from PIL.Image import Image

from server_plugin.backends.base import Generation, View


@dataclass(frozen=True, slots=True)
class NamedPicture:
    """A picture as it is passed to the engine.

    Attributes:
        image: RGB, as the checkpoint's image processor takes it.
        name: identifies the pixels, also in vLLM's caches.
    """

    image: Image
    name: str


@dataclass(slots=True, eq=False)
class VllmView:
    """A global view: its pixels, and its generic row if that was needed.

    Attributes:
        images: the pictures, one or more; None after a release.
        pictures: number of pictures.
        generic: the task that computes the generic row; None if it was never needed.
    """

    images: tuple[NamedPicture, ...] | None
    pictures: int = 1
    generic: asyncio.Task[Generation] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of pixels and row, in bytes. vLLM's own caches have separate budgets."""
        pixels = sum(math.prod(picture.image.size) * 3 for picture in self.images or ())
        generic = result_of(self.generic)
        return pixels + (0 if generic is None or generic.row is None else generic.row.nbytes)


def pictures_of(view: View) -> tuple[NamedPicture, ...]:
    """Return the pictures of a view.

    Raises:
        RuntimeError: the view was released.
    """
    assert isinstance(view, VllmView)
    if view.images is None:
        raise RuntimeError("this view was released")
    return view.images


def result_of(task: asyncio.Task[Generation] | None) -> Generation | None:
    """Return the result of a task; None if it has not ended, failed or was cancelled."""
    if task is None or not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()
