"""The interface of every camera."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from edge_client.picture import Picture
from vlm_collab.errors import ImageError

News = Callable[[str], None]
"""Called, from any thread, with a line of text about the state of the camera."""


class CameraError(ImageError):
    """The camera gives no picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraFrame:
    """A picture from a camera.

    Attributes:
        number: counts the pictures that the source delivered, from 1.
        latest: number of the newest picture at that time. `number` is smaller if an earlier
            picture was sharper.
        time_s: time of arrival, Unix time.
        position_s: position in a recording; None for other sources.
        picture: the picture, upright and without metadata.
    """

    number: int
    latest: int
    time_s: float
    position_s: float | None
    picture: Picture


class Camera(ABC):
    """A source of pictures. Close it when done. Only one thread at a time may call `take`.

    Attributes:
        name: the source without a password, for messages.
        still: the pictures are files on disk, which change only when somebody writes them.
        on_demand: a recording that is read only as fast as frames are taken, so that none is
            missed.
        ended: no more pictures will come.
    """

    name: str
    still: bool = False
    on_demand: bool = False
    ended: bool = False
    _trouble: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def trouble(self) -> str | None:
        """Reason why there is no good picture now; None if nothing is wrong."""
        return self._trouble

    @property
    def without_picture_s(self) -> float:
        """Time since the last good picture, in s; 0 for a source that need not deliver any."""
        return 0.0

    @abstractmethod
    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> CameraFrame | None:
        """Return the newest good picture.

        Args:
            after: accept only a picture with a larger number.
            due: wait until the source has delivered this many pictures.
            due_s: read a recording on demand up to this position, in s. Other sources ignore it.
            wait_s: longest time to wait, in s.

        Returns:
            None if there was none in time; `trouble` and `ended` may give the reason.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the source; a running `take` returns. Closing twice does nothing."""
