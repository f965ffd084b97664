"""Base class of live sources, which deliver pictures whether or not they are taken."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from functools import partial

from edge_client.cameras.base import Camera, CameraError, CameraFrame, News
from edge_client.retry import Retry

SILENCE_S = 5.0
"""After this time without a good picture, a source counts as in trouble."""

_BLANK = "the picture is blank: black, grey, or the lens is covered"


class LiveCamera(Camera):
    """A source that a thread reads continuously, so that a slow caller gets no old pictures.

    A lost source is reopened without limit. If it sends no good pictures, or nothing at all,
    `trouble` says so after `SILENCE_S`.

    Args:
        name: see `Camera`.
        news: called when the source is lost and when it is back.
        retry: pauses between attempts to reopen it.
    """

    def __init__(self, name: str, news: News, retry: Retry) -> None:
        self.name = name
        self._news = news
        self._retry = retry
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failures = 0  # since the last picture
        self._reached = False  # it is open; it may still deliver nothing
        self._good_s = time.monotonic()  # time of the last good picture
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
        """See `Camera.close`. A thread that waits for a silent camera ends after its time-out."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    @property
    def trouble(self) -> str | None:
        """See `Camera`."""
        trouble, without_picture_s = self._trouble, self.without_picture_s
        if trouble is None and without_picture_s >= SILENCE_S:
            return f"{self.name}: no picture for {without_picture_s:.0f} s; {self._silence()}"
        if trouble is not None and self._failures and self._reached:
            return f"{trouble}; it was opened again, but {self._silence()}"
        return trouble

    @property
    def without_picture_s(self) -> float:
        """See `Camera`."""
        return 0.0 if self.ended else time.monotonic() - self._good_s

    def _is_ready(self, wanted: int) -> bool:
        return self._latest() >= wanted or self.ended or self._closed.is_set()

    @abstractmethod
    def _latest(self) -> int:
        """Return the number of the newest picture that may be taken; 0 for none."""

    @abstractmethod
    def _best(self, after: int) -> CameraFrame | None:
        """Return the best of the newest pictures after a number; None if all are blank."""

    @abstractmethod
    def _follow(self) -> str:
        """Open the source and read it to its end; call `_arrived` for each picture.

        Returns:
            The reason why it ended.

        Raises:
            CameraError: it cannot be opened or read; the message is the reason.
        """

    @abstractmethod
    def _silence(self) -> str:
        """Describe what the source does while no picture comes."""

    def _arrived(self) -> None:
        """Note that a new picture has arrived, and wake a waiting `take`."""
        if self._failures:
            self._news(f"{self.name} is back after {self.without_picture_s:.0f} s")
        with self._changed:
            if self._failures:
                self._failures, self._trouble = 0, None
            if self._trouble is None:
                self._good_s = time.monotonic()
            self._changed.notify_all()

    def _is_over(self) -> bool:
        """Whether the source has ended for good after it was read to its end."""
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
