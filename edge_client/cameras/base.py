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
"""Called, from any thread, with a line for a person about how the camera is doing."""


class CameraError(ImageError):
    """There is no picture to be had from a camera."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraFrame:
    """A picture that a camera took.

    Attributes:
        number: its number, from 1, among all the pictures that the source delivered.
        latest: number of the newest picture at the time; `number` is smaller where an earlier one
            was sharper.
        time_s: when it came, in Unix time.
        position_s: where it lies in a recording; None for everything else.
        picture: the picture, upright and without metadata.
    """

    number: int
    latest: int
    time_s: float
    position_s: float | None
    picture: Picture


class Camera(ABC):
    """A source of pictures. Close it when done; `take` is for one thread at a time.

    Attributes:
        name: the source as people may see it, without a password.
        still: pictures on disk, which come when somebody writes them.
        on_demand: a recording that waits for who takes its frames: nothing is ever missed.
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
        """Why there is no good picture now; None if nothing is wrong."""
        return self._trouble

    @property
    def lacking_s(self) -> float:
        """For how long the source has given no good picture, in s; 0 if it need not."""
        return 0.0

    @abstractmethod
    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> CameraFrame | None:
        """The newest good picture.

        Args:
            after: only one with a larger number than this.
            due: wait until the source delivered so many pictures.
            due_s: in a recording on demand, read on to this position, in s. Others ignore it.
            wait_s: how long to wait.

        Returns:
            None if there was none in time; `trouble` and `ended` may say why.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the source; a `take` under way returns. Closing twice does nothing."""
