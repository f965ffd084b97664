"""What all sources share that deliver pictures whether anybody takes them or not."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from functools import partial

from edge_client.cameras.base import Camera, CameraError, CameraFrame, News
from edge_client.retry import Retry

SILENCE_S = 5.0
"""A source without a good picture for so long is in trouble, whatever it does meanwhile."""

_BLANK = "the camera shows nothing: black, grey or covered"


class Live(Camera):
    """A source that a thread reads as it comes, so that a slow taker gets no old pictures.

    A source that is lost is opened again, for as long as it takes. Whatever it sends instead of
    good pictures, and if it sends nothing at all, `trouble` says so after `SILENCE_S`.

    Args:
        name: see `Camera`.
        news: is told when the source is lost and when it is back.
        retry: pauses between attempts to get it back.
    """

    def __init__(self, name: str, news: News, retry: Retry) -> None:
        self.name = name
        self._news = news
        self._retry = retry
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failures = 0  # since the last picture
        self._reached = False  # it is open, and may or may not deliver
        self._good_s = time.monotonic()  # when there was a good picture last
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> CameraFrame | None:
        """See `Camera.take`."""
        until = time.monotonic() + wait_s
        wanted = max(due, after + 1)
        while True:
            with self._changed:
                left_s = max(0.0, until - time.monotonic())
                self._changed.wait_for(partial(self._is_ready, wanted), left_s)
                latest = self._latest()
            if self._closed.is_set() or latest < wanted:
                return None
            frame = self._best(after)
            with self._changed:
                if frame is not None:
                    if self._trouble == _BLANK:
                        self._trouble, self._good_s = None, time.monotonic()
                    return frame
                if self._trouble is None:
                    self._trouble = _BLANK
            wanted = latest + 1

    def close(self) -> None:
        """See `Camera.close`. A reader that waits for a silent camera ends when that times out."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    @property
    def trouble(self) -> str | None:
        """See `Camera`."""
        trouble, lacking_s = self._trouble, self.lacking_s
        if trouble is None and lacking_s >= SILENCE_S:
            return f"{self.name}: no picture for {lacking_s:.0f} s; {self._silence()}"
        if trouble is not None and self._failures and self._reached:
            return f"{trouble}; now it is there again, but {self._silence()}"
        return trouble

    @property
    def lacking_s(self) -> float:
        """See `Camera`."""
        return 0.0 if self.ended else time.monotonic() - self._good_s

    def _is_ready(self, wanted: int) -> bool:
        return self._latest() >= wanted or self.ended or self._closed.is_set()

    @abstractmethod
    def _latest(self) -> int:
        """Number of the newest picture that may be taken; 0 for none."""

    @abstractmethod
    def _best(self, after: int) -> CameraFrame | None:
        """The best of the newest pictures after a number; None if they show nothing."""

    @abstractmethod
    def _follow(self) -> str:
        """Open the source and read it as long as it goes; call `_came` for each picture.

        Returns:
            Why it ended.

        Raises:
            CameraError: the same.
        """

    @abstractmethod
    def _silence(self) -> str:
        """What the source does while no picture comes."""

    def _came(self) -> None:
        """There is a new picture."""
        if self._failures:
            self._news(f"{self.name} is back after {self.lacking_s:.0f} s")
        with self._changed:
            if self._failures:
                self._failures, self._trouble = 0, None
            if self._trouble is None:
                self._good_s = time.monotonic()
            self._changed.notify_all()

    def _is_over(self) -> bool:
        """Whether a source that was read to its end has nothing more to give."""
        return False

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                reason = self._follow()
            except CameraError as error:
                reason = str(error).removeprefix(f"{self.name}: ")
            if self._closed.is_set() or self._is_over():
                break
            with self._changed:
                self._failures += 1
                self._trouble = f"{self.name} is lost: {reason}"
            if self._failures == 1:
                self._news(f"{self._trouble}; trying to get it back")
            self._closed.wait(self._retry.pause_s(self._failures))
