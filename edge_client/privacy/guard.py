"""Check the privacy policy before an image leaves the device, and write the image to the audit log.

A program that sends pictures keeps one `Guard` per camera and calls it at four places:

1. `guard.masked(picture)`: from then on, use only the masked picture;
2. `question = guard.question(text)`, then `question.begin()` before anything is sent;
3. `question.record_views(…)` right before the message with the views is sent;
4. `question.may_send(…)` before a region is cut, `question.region_leaves(…)` before it is sent.

`EdgeClient` does all of this itself if it has a policy or an audit log.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from PIL import Image

from edge_client.addresses import without_secrets
from edge_client.picture import Picture
from edge_client.privacy.audit_log import AuditLog, ImageLine, LogTail, RegionLine, ViewLine
from edge_client.privacy.policy import DEFAULT_CAMERA, CameraPolicy, PrivacyPolicy, load_policy
from vlm_collab.errors import PrivacyError
from vlm_collab.geometry import Box, Fit, Size, frame_of
from vlm_collab.pictures.headers import Codec
from vlm_collab.protocol.messages import DeclineReason

log = logging.getLogger(__name__)

HOUR = datetime.timedelta(hours=1)

Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """Return the time of the device's clock."""
    return datetime.datetime.now(datetime.UTC)


class BudgetError(PrivacyError):
    """The hourly byte limit is used up."""


class Guard:
    """Enforces one camera's policy and writes its audit log. Safe to use from several threads.

    The hourly byte limit counts what this process sent and what other processes logged for the
    same camera. So the count survives a restart, and all processes that share a log share it.
    Moving the log away does not reset the count of a running process. Without a log, bytes are
    counted in memory only.

    Args:
        policy: the camera's rules.
        audit: log of the images that leave; None for no log.
        server: address that images go to; it is stored without user, password and query.
        clock: returns the time, with a time zone.
    """

    def __init__(
        self,
        policy: CameraPolicy,
        *,
        audit: AuditLog | None = None,
        server: str = "",
        clock: Clock = utc_now,
    ) -> None:
        self.policy = policy
        self._audit = audit
        self._server = without_secrets(server)
        self._clock = clock
        self._masked: weakref.WeakKeyDictionary[Picture, Picture] = weakref.WeakKeyDictionary()
        self._recent = None if audit is None else LogTail(audit.path)
        self._spent: list[tuple[datetime.datetime, int]] = []
        self._lock = threading.Lock()

    def masked(self, picture: Picture) -> Picture:
        """Return the picture with hidden areas black; the same picture if none are hidden.

        A picture always gets the same masked picture, so that follow-up questions send no pixels.

        Raises:
            PrivacyError: the policy was made for another aspect ratio.
        """
        boxes = self.policy.hidden(picture.size)
        if self._audit is not None:
            _ = picture.digest  # compute it in the caller's thread, not while sending
        if not boxes:
            return picture
        with self._lock:
            masked = self._masked.get(picture)
            if masked is None:
                masked = self._masked[picture] = picture.hiding(boxes)
        return masked

    def question(self, text: str) -> QuestionGuard:
        """Return the guard of one question, about one or several pictures."""
        return QuestionGuard(self, text)

    def check_time(self) -> None:
        """Check that images may leave now.

        Raises:
            PrivacyError: during quiet hours.
        """
        hours = self.policy.quiet(self._clock())
        if hours is not None:
            raise PrivacyError(
                f'camera "{self.policy.name}": the policy allows no sending during {hours}'
            )

    def check_view(self, side: Size) -> None:
        """Check that views of this size, in px, may leave.

        Raises:
            PrivacyError: they are larger than the policy allows.
        """
        most = self.policy.max_view_pixels
        if most is not None and side.width * side.height > most:
            raise PrivacyError(
                f'camera "{self.policy.name}": the policy allows views of {most} px; the server '
                f"wants {side.width} x {side.height}"
            )

    def check_bytes(self, wanted: int) -> None:
        """Check that this many bytes may leave now.

        Raises:
            BudgetError: the last hour's bytes would exceed the policy's limit.
        """
        limit = self.policy.max_bytes_per_hour
        if limit is None:
            return
        since = self._clock() - HOUR
        if self._recent is not None:
            for line in self._recent.lines(since):
                if line.camera == self.policy.name:
                    self._spent.append((line.time, line.bytes))
        self._spent = [(when, bytes) for when, bytes in self._spent if when > since]
        spent = sum(bytes for _, bytes in self._spent)
        if spent + wanted > limit:
            raise BudgetError(
                f'camera "{self.policy.name}": the policy allows {limit} bytes an hour; {spent} '
                f"were sent, and {wanted} more would exceed the limit"
            )

    def record_sent(self, lines: Sequence[ImageLine], hidden: Sequence[tuple[Box, ...]]) -> None:
        """Count and log images before they leave, all or none.

        Args:
            lines: one for each image, with `hidden` not set.
            hidden: black areas of each image.

        Raises:
            PrivacyError: they may not leave, or cannot be logged.
        """
        with self._lock:
            self.check_time()
            self.check_bytes(sum(line.bytes for line in lines))
            for line, boxes in zip(lines, hidden, strict=True):
                if self._audit is not None:
                    key = self._audit.hidden(boxes, line.time)
                    line = msgspec.structs.replace(line, hidden=key)
                    self._audit.write(line)
                self._count(line)

    def _count(self, line: ImageLine) -> None:
        """Count an image when it leaves; its log line may never be read back."""
        if self.policy.max_bytes_per_hour is None:
            return
        self._spent.append((line.time, line.bytes))
        if self._recent is not None:
            self._recent.wrote(line)

    def described(self, picture: Picture, image: bytes, codec: int, quality: int) -> dict[str, Any]:
        """Return the fields that the log lines of views and regions have in common."""
        logged = self._audit is not None  # only the log needs hashes
        return {
            "time": self._clock().astimezone(datetime.UTC),
            "camera": self.policy.name,
            "picture": picture.digest if logged else "",
            "name": picture.name,
            "source_px": picture.size,
            "codec": Codec(codec).name,
            "quality": quality,
            "bytes": len(image),
            "sha256": hashlib.sha256(image).hexdigest() if logged else "",
            "server": self._server,
        }


class QuestionGuard:
    """Checks what leaves for one question, over all its attempts; see `Guard.question`."""

    def __init__(self, guard: Guard, text: str) -> None:
        """Use `Guard.question` instead."""
        self._guard = guard
        self._text = text
        self._regions: set[tuple[Picture, Box]] = set()

    def begin(self) -> None:
        """Call before anything of the question is sent.

        Raises:
            PrivacyError: nothing may leave now.
        """
        self._guard.check_time()

    def check_view(self, side: Size) -> None:
        """Call before views of this size, in px, are made.

        Raises:
            PrivacyError: they are larger than the policy allows.
        """
        self._guard.check_view(side)

    def record_views(
        self,
        views: Sequence[tuple[Picture, bytes]],
        side: Size,
        fit: Fit,
        codec: int,
        quality: int,
    ) -> None:
        """Call right before a message with views is sent; after it returns they may leave.

        Args:
            views: masked pictures, each with its encoded view.
            side, fit, codec, quality: how the views were encoded.

        Raises:
            PrivacyError: they must not leave.
        """
        self.check_view(side)
        lines = []
        for picture, image in views:
            frame = frame_of(picture.size, fit, side)
            left, top = max(frame.left, 0), max(frame.top, 0)
            right = min(frame.left + frame.width, picture.size.width)
            bottom = min(frame.top + frame.height, picture.size.height)
            lines.append(
                ViewLine(
                    **self._guard.described(picture, image, codec, quality),
                    question=self._text,
                    box=Box(left, top, right, bottom),
                    size_px=side,
                    fit=fit,
                )
            )
        self._guard.record_sent(lines, [picture.hidden for picture, _ in views])

    def may_send(self, picture: Picture, box: Box) -> DeclineReason | None:
        """Return None if a region may be cut, else the reason to send to the server.

        Args:
            picture: masked.
            box: px of the upright original.
        """
        policy = self._guard.policy
        try:
            self._guard.check_time()
        except PrivacyError as error:
            log.info("a region was declined: %s", error)
            return DeclineReason.PRIVACY
        if box.pixels > policy.max_region_share * picture.size.width * picture.size.height:
            return DeclineReason.LIMIT
        most = policy.max_regions_per_question
        # The same region may be sent again after a lost link.
        if most is not None and len(self._regions | {(picture, box)}) > most:
            return DeclineReason.LIMIT
        return DeclineReason.PRIVACY if _covered(box, picture.hidden) else None

    def region_leaves(
        self, picture: Picture, image: bytes, box: Box, target: Size, codec: int, quality: int
    ) -> DeclineReason | None:
        """Call right before a region is sent; if it returns None, the region may leave.

        Args:
            picture: masked.
            image: the encoded region.
            box: px of the upright original.
            target: size that the server asked for.
            codec, quality: how it was encoded.

        Returns:
            None, or the reason to decline.
        """
        line = RegionLine(
            **self._guard.described(picture, image, codec, quality),
            question=self._text,
            box=box,
            size_px=Size(min(box.width, target.width), min(box.height, target.height)),
            target_px=target,
        )
        try:
            self._guard.record_sent([line], [picture.hidden])
        except PrivacyError as error:
            log.info("a region was declined: %s", error)
            return DeclineReason.LIMIT if isinstance(error, BudgetError) else DeclineReason.PRIVACY
        self._regions.add((picture, box))
        return None


def open_guard(
    policy: PrivacyPolicy | str | os.PathLike[str] | None,
    camera: str | None,
    audit: str | os.PathLike[str] | None,
    server: str,
) -> Guard:
    """Make a guard from settings; without a policy it lets everything leave.

    Args:
        policy: a policy file or a loaded policy.
        camera: camera whose rules apply; None for the `default` entry.
        audit: file of the audit log; None for no log.
        server: address that images go to.

    Raises:
        ConfigError: the policy or the log cannot be used, or the policy has no entry for the
            camera.
    """
    if policy is None:
        rules = CameraPolicy(name=camera or DEFAULT_CAMERA)
    else:
        loaded = policy if isinstance(policy, PrivacyPolicy) else load_policy(policy)
        rules = loaded.for_camera(camera)
    return Guard(rules, audit=None if audit is None else AuditLog(audit), server=server)


def _covered(box: Box, hidden: Sequence[Box]) -> bool:
    """Whether hidden areas cover a box completely."""
    over = [Box(*map(max, other[:2], box[:2]), *map(min, other[2:], box[2:])) for other in hidden]
    over = [part for part in over if part.left < part.right and part.top < part.bottom]
    if sum(part.pixels for part in over) < box.pixels:
        return False
    seen = Image.new("L", box.size, 1)
    for left, top, right, bottom in over:
        seen.paste(0, (left - box.left, top - box.top, right - box.left, bottom - box.top))
    return seen.getbbox() is None
