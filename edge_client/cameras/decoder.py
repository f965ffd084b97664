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
"""A camera that sends nothing for so long is lost."""

BEHIND_S = 1.0
"""A live source that had always a frame ready for so long is ahead of its decoder."""

_WAITED_S = 0.004  # a read that took so long had to wait for the source

MENDED_FRAMES = 300
"""So many frames after damage, pictures without key frames have been refreshed all over."""

_JPEG_END_BYTES = 1024  # with what cameras put after the end


class FrameDecoder:
    """The frames of an open source that are whole, each with its number.

    After damage, a decoder goes on from a broken picture; so what follows is passed over up to
    the next key frame, from which it starts afresh. Streams that refresh their pictures bit by
    bit have none; they are mended after so many frames.

    A live source that is faster than this machine decodes would be shown later and later. When
    it has not had to be waited for in a while, it is ahead; then only key frames are decoded
    until it has to be waited for again.

    Attributes:
        count: frames so far, those passed over included.
        damaged: how many were passed over because of damage.
        late: how many were passed over to catch up.
        waited: the source had to be waited for since it was opened: what comes is new. What was
            read to find out its format is up to some seconds old by then, and comes first.
    """

    def __init__(self, *, live: bool) -> None:
        self.count = self.damaged = self.late = 0
        self.waited = False
        self._live = live
        self._strict = True
        self._whole = False  # a stream may be joined between two key frames
        self._since = 0  # frames since the last damage
        self._bad_in_a_row = 0

    def frames(self, container: InputContainer) -> Iterator[VideoFrame]:
        """Whole frames, as they come.

        Raises:
            FFmpegError: the source is gone.
            CameraError: it has nothing but damaged frames, or no pictures at all; opened again,
                less is called damage.
        """
        stream = container.streams.video[0]
        # One frame at a time: several at once would each be delivered late, and FFmpeg would not
        # tell of damage, but patch it up.
        stream.codec_context.thread_count = 1
        if self._strict:
            stream.codec_context.options = {"err_detect": "explode"}
        self._whole, self._since, self._bad_in_a_row = False, 0, 0
        self.waited = False
        # With sound and all: while that comes, nothing would tell that there are no pictures.
        streams: list[Any] = [] if self._live else [stream]
        packets: Iterator[Packet[Any]] = container.demux(*streams)
        waited_s = key_s = shown_s = time.monotonic()
        skipped = 0  # frames since the last one that was decoded
        while True:
            asked_s = time.monotonic()
            packet = next(packets, None)
            if packet is None:
                return
            now = time.monotonic()
            if packet.stream.index != stream.index:
                if now - shown_s > READ_TIMEOUT_S:
                    raise CameraError(f"no picture came for {READ_TIMEOUT_S:g} s")
                continue
            shown_s = now
            if now - asked_s >= _WAITED_S:
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
                    self._whole, self._since = False, 0
                    continue
            if packet.is_corrupt:
                self._harmed()
            if not self._strict and _is_cut_off(packet):
                self.count += 1
                self.damaged += 1
                self._harmed()
                continue
            try:
                frames = _decoded(packet)
            except InvalidDataError:
                self.count += 1
                self.damaged += 1
                self._harmed()
                continue
            for frame in frames:
                self.count += 1
                if self._is_whole(frame):
                    yield frame
                else:
                    self.damaged += 1

    def _is_whole(self, frame: VideoFrame) -> bool:
        self._since += 1
        if frame.is_corrupt:
            self._harmed()
        elif frame.key_frame or self._since > MENDED_FRAMES:
            self._whole = True
        if self._whole:
            self._bad_in_a_row = 0
        return self._whole

    def _harmed(self) -> None:
        self._whole, self._since = False, 0
        self._bad_in_a_row += 1
        if self._live and self._bad_in_a_row > MENDED_FRAMES:
            # Some cameras bend the rules in every frame, and are readable all the same.
            self._strict = False
            raise CameraError("all its pictures are damaged")


def _is_cut_off(packet: Packet[VideoStream]) -> bool:
    """Whether a JPEG lacks its end. A decoder that is lenient would paint the rest grey."""
    jpeg = packet.stream.codec_context.name == "mjpeg" and packet.size > 0
    return jpeg and b"\xff\xd9" not in bytes(packet)[-_JPEG_END_BYTES:]


def _decoded(packet: Packet[VideoStream]) -> list[VideoFrame]:
    return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
