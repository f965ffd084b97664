"""Decode the undamaged frames of a video, and keep up with a live source."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from av.container import InputContainer
from av.error import InvalidDataError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from edge_client.cameras.base import CameraError

READ_TIMEOUT_S = 10.0
"""A camera that sends nothing for this time counts as lost."""

BEHIND_S = 1.0
"""If no read had to wait for a live source during this time, the decoder is behind the source."""

_WAITED_S = 0.004  # a read that takes this long had to wait for the source

MENDED_FRAMES = 300
"""Streams without key frames count as repaired this many frames after damage."""

_JPEG_END_BYTES = 1024  # includes what cameras append after the end marker


class FrameDecoder:
    """Yields the undamaged frames of an open source, and counts all frames.

    After damage, a decoder continues from a broken picture. So frames are skipped up to the next
    key frame. Some streams have no key frames and refresh their pictures bit by bit; they count as
    repaired after `MENDED_FRAMES`.

    If a live source is faster than this machine decodes, the delay would keep growing. When no
    read has had to wait for the source for `BEHIND_S`, only key frames are decoded until a read
    waits again.

    Attributes:
        count: frames so far, including skipped ones.
        damaged: frames skipped because of damage.
        late: frames skipped to catch up.
        waited: a read has waited for the source since it was opened, so frames are current. The
            first frames were buffered while FFmpeg detected the format, and may be seconds old.
    """

    def __init__(self, *, live: bool) -> None:
        self.count = self.damaged = self.late = 0
        self.waited = False
        self._live = live
        self._strict = True
        self._intact = False  # False at first: a stream may be joined between two key frames
        self._since_damage = 0  # frames
        self._bad_in_a_row = 0

    def frames(self, container: InputContainer) -> Iterator[VideoFrame]:
        """Yield undamaged frames as they come.

        Raises:
            FFmpegError: the source is gone.
            CameraError: it sends only damaged frames, or no pictures at all. When it is opened
                again, fewer faults count as damage.
        """
        stream = container.streams.video[0]
        # One thread: with several, FFmpeg delivers each frame later, and conceals damage instead
        # of reporting it.
        stream.codec_context.thread_count = 1
        if self._strict:
            stream.codec_context.options = {"err_detect": "explode"}
        self._intact, self._since_damage, self._bad_in_a_row = False, 0, 0
        self.waited = False
        # Live: read sound packets too, to notice a source that sends sound but no pictures.
        streams: list[Any] = [] if self._live else [stream]
        packets: Iterator[Packet[Any]] = container.demux(*streams)
        waited_s = key_s = picture_s = time.monotonic()
        skipped = 0  # frames since the last one that was decoded
        while True:
            read_began_s = time.monotonic()
            packet = next(packets, None)
            if packet is None:
                return
            now = time.monotonic()
            if packet.stream.index != stream.index:
                if now - picture_s > READ_TIMEOUT_S:
                    raise CameraError(f"no picture came for {READ_TIMEOUT_S:g} s")
                continue
            picture_s = now
            if now - read_began_s >= _WAITED_S:
                waited_s = now
                self.waited = True
            behind = self._live and now - waited_s > BEHIND_S
            if behind or skipped:
                if packet.is_keyframe and (not behind or now - key_s >= BEHIND_S / 2):
                    skipped, key_s = 0, now
                elif skipped < MENDED_FRAMES:
                    skipped += 1
                    self.count += 1
                    self.late += 1
                    self._intact, self._since_damage = False, 0
                    continue
            if packet.is_corrupt:
                self._note_damage()
            if not self._strict and _is_cut_off(packet):
                self.count += 1
                self.damaged += 1
                self._note_damage()
                continue
            try:
                frames = _decoded(packet)
            except InvalidDataError:
                self.count += 1
                self.damaged += 1
                self._note_damage()
                continue
            for frame in frames:
                self.count += 1
                if self._is_intact(frame):
                    yield frame
                else:
                    self.damaged += 1

    def _is_intact(self, frame: VideoFrame) -> bool:
        self._since_damage += 1
        if frame.is_corrupt:
            self._note_damage()
        elif frame.key_frame or self._since_damage > MENDED_FRAMES:
            self._intact = True
        if self._intact:
            self._bad_in_a_row = 0
        return self._intact

    def _note_damage(self) -> None:
        self._intact, self._since_damage = False, 0
        self._bad_in_a_row += 1
        if self._live and self._bad_in_a_row > MENDED_FRAMES:
            # Some cameras break the standard in every frame, but can still be decoded.
            self._strict = False
            raise CameraError("all its pictures are damaged")


def _is_cut_off(packet: Packet[VideoStream]) -> bool:
    """Whether a JPEG lacks its end. A lenient decoder would fill the rest with grey."""
    jpeg = packet.stream.codec_context.name == "mjpeg" and packet.size > 0
    return jpeg and b"\xff\xd9" not in bytes(packet)[-_JPEG_END_BYTES:]


def _decoded(packet: Packet[VideoStream]) -> list[VideoFrame]:
    return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
