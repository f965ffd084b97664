"""Webcams, streams and recordings, read with PyAV (the `camera` extra)."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.video.frame import VideoFrame

from edge_client.addresses import without_password
from edge_client.cameras import sharpest
from edge_client.cameras.base import Camera, CameraError, CameraFrame, News
from edge_client.cameras.decoder import READ_TIMEOUT_S, FrameDecoder
from edge_client.cameras.live import LiveCamera
from edge_client.cameras.upright import brightness_of, picture_of
from edge_client.picture import Picture
from edge_client.retry import Retry

OPEN_TIMEOUT_S = 10.0

KEPT_FRAMES = 4
KEPT_S = 0.5
"""`take` returns the sharpest of the last frames; none of them is older than this."""

# A playlist or session description must not make this device read local files, and a file must
# not make it open network connections.
_NETWORK = "rtsp,rtp,udp,tcp,tls,http,https,httpproxy,crypto,hls"
_LOCAL = "file"

# ISO/IEC 23008-12; the last four are animations.
_PICTURE_BRANDS = {
    *("avif", "heic", "heix", "heim", "heis", "mif1", "mif2"),
    *("avis", "hevc", "hevx", "msf1"),
}

# FFmpeg's own log lines contain the full address with its password; our errors replace them.
av.logging.set_level(None)


@dataclass(frozen=True, slots=True)
class _OpenArguments:
    """PyAV's arguments to open a source."""

    name: str
    address: str
    options: dict[str, str]
    format: str | None = None

    def open(self) -> InputContainer:
        """Open it.

        Raises:
            CameraError: it cannot be opened; the message is the reason.
        """
        try:
            container = av.open(
                self.address,
                format=self.format,
                options=self.options,
                timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
            )
        except (FFmpegError, OSError, ValueError) as error:
            raise CameraError(f"{self.name}: {_reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise CameraError(f"{self.name}: it contains no video")
        if _is_picture(container):
            # `Picture.open` handles the three supported formats; FFmpeg would accept others.
            container.close()
            raise CameraError(f"{self.name}: neither a video nor a JPEG, PNG or WebP picture")
        if container.streams.video[0].metadata.get("alpha_mode") == "1":
            # FFmpeg's VP8 and VP9 decoders ignore transparency and would show hidden colours.
            container.close()
            raise CameraError(f"{self.name}: WebM recordings with transparency are not supported")
        return container


def open_webcam(device: str, size: str | None, news: News, retry: Retry) -> Camera:
    """Open a webcam through Video4Linux.

    Args:
        device: device file.
        size: picture size such as "1920x1080"; None for the webcam's current setting.

    Raises:
        CameraError: it cannot be opened.
    """
    options = {} if size is None else {"video_size": size}
    return LiveVideo(_OpenArguments(device, device, options, "v4l2"), news, retry)


def open_stream(url: str, news: News, retry: Retry, *, live: bool) -> Camera:
    """Open a stream, or a recording on a web server.

    Raises:
        CameraError: it cannot be opened.
    """
    options = {"protocol_whitelist": _NETWORK, "analyzeduration": "1000000"}
    rtsp = urlsplit(url).scheme.lower() in ("rtsp", "rtsps")
    if rtsp:
        # Over UDP a lost packet damages the picture. UDP is used only where TCP is not offered.
        options |= {"rtsp_flags": "prefer_tcp", "allowed_media_types": "video"}
    opening = _OpenArguments(without_password(url), url, options)
    if not rtsp:
        container = opening.open()
        if container.duration:
            if live:
                return RecordingPlayback(opening, container, news)
            return Recording(opening, container)
        container.close()
    return LiveVideo(opening, news, retry)


def open_recording(path: str, news: News, *, live: bool) -> Camera:
    """Open a video file.

    Raises:
        CameraError: it cannot be opened.
    """
    opening = _OpenArguments(path, f"file:{path}", {"protocol_whitelist": _LOCAL})
    container = opening.open()
    return RecordingPlayback(opening, container, news) if live else Recording(opening, container)


@dataclass(frozen=True, slots=True)
class _RecentFrame:
    """A recent frame. `moment_s` is monotonic time, for comparisons only."""

    number: int
    moment_s: float
    time_s: float
    position_s: float | None
    frame: VideoFrame


def _best_frame(recent: list[_RecentFrame], after: int, name: str) -> CameraFrame | None:
    """Return the best of the recent frames; None if all are blank."""
    fresh = [
        one for one in recent if one.number > after and one.moment_s >= recent[-1].moment_s - KEPT_S
    ]
    index = sharpest.best([brightness_of(one.frame) for one in fresh])
    if index is None:
        return None
    one = fresh[index]
    return CameraFrame(
        number=one.number,
        latest=recent[-1].number,
        time_s=one.time_s,
        position_s=one.position_s,
        picture=Picture.from_pil(picture_of(one.frame), name=f"{name}, frame {one.number}"),
    )


class Recording(Camera):
    """A recording that is read only as fast as frames are taken.

    Raises (from `take`):
        CameraError: the rest cannot be read.
    """

    on_demand = True

    def __init__(self, opening: _OpenArguments, container: InputContainer) -> None:
        self.name = opening.name
        self._decoder = FrameDecoder(live=False)
        self._recent: deque[_RecentFrame] = deque(maxlen=KEPT_FRAMES)
        self._container = container
        self._frames = self._decoder.frames(container)
        self._reading = threading.Lock()

    def take(
        self, *, after: int = 0, due: int = 0, due_s: float = 0.0, wait_s: float = 0.0
    ) -> CameraFrame | None:
        """See `Camera.take`; waits only for the disk or the web server."""
        with self._reading:
            while not self.ended:
                if self._recent and self._reached(after, due, due_s):
                    frame = _best_frame(list(self._recent), after, self.name)
                    if frame is not None:
                        return frame
                self._read()
        return None

    def close(self) -> None:
        """See `Camera.close`."""
        self.ended = True
        with self._reading:  # wait until no thread decodes from it
            self._container.close()

    def _reached(self, after: int, due: int, due_s: float) -> bool:
        last = self._recent[-1]
        return last.number >= max(due, after + 1) and (last.position_s or 0.0) >= due_s

    def _read(self) -> None:
        try:
            frame = next(self._frames, None)
        except (FFmpegError, OSError) as error:
            self.ended = True
            raise CameraError(f"{self.name}: {_reason(error)}") from error
        if frame is None:
            self.ended = True
            return
        position_s = frame.time or 0.0
        number = self._decoder.count
        self._recent.append(_RecentFrame(number, position_s, time.time(), position_s, frame))


class LiveVideo(LiveCamera):
    """A webcam or a stream. The last few frames are kept, so that the sharpest can be chosen.

    Raises:
        CameraError: it cannot be opened at all.
    """

    def __init__(self, opening: _OpenArguments, news: News, retry: Retry) -> None:
        super().__init__(opening.name, news, retry)
        self._setup(opening, opening.open(), live=True)
        self._thread.start()

    def _setup(self, opening: _OpenArguments, container: InputContainer, *, live: bool) -> None:
        self._opening = opening
        self._opened: InputContainer | None = container
        self._decoder = FrameDecoder(live=live)
        self._recent: deque[_RecentFrame] = deque(maxlen=KEPT_FRAMES)
        self._decoded_all = False
        self._damaged = 0  # number of damaged frames when the last good one came

    def _latest(self) -> int:
        return self._recent[-1].number if self._recent and self._is_current() else 0

    def _best(self, after: int) -> CameraFrame | None:
        with self._changed:
            recent = list(self._recent)
        return _best_frame(recent, after, self.name)

    def _silence(self) -> str:
        damaged = self._decoder.damaged > self._damaged
        return "it sends only damaged pictures" if damaged else "it sends nothing"

    def _follow(self) -> str:
        container, self._opened = self._opened or self._opening.open(), None
        self._decoded_all = False
        self._reached = True
        try:
            for frame in self._decoder.frames(container):
                self._keep(frame)
                if self._closed.is_set():
                    break
        except (FFmpegError, OSError) as error:
            return _reason(error, f"no data for {READ_TIMEOUT_S:g} s")
        finally:
            self._reached = False
            self._all_decoded()
            container.close()
        return "the stream ended"

    def _is_current(self) -> bool:
        """Whether the last frame is new, not buffered from when the source was opened."""
        return self._decoder.waited or self._decoded_all

    def _all_decoded(self) -> None:
        """Note that no newer frame will come."""
        with self._changed:
            self._decoded_all = True
            self._changed.notify_all()

    def _keep(self, frame: VideoFrame) -> None:
        with self._changed:
            self._recent.append(
                _RecentFrame(
                    self._decoder.count, time.monotonic(), time.time(), self._position(frame), frame
                )
            )
            self._damaged = self._decoder.damaged
        self._arrived()

    def _position(self, frame: VideoFrame) -> float | None:
        return None


class RecordingPlayback(LiveVideo):
    """A recording played at its own speed, like a camera."""

    def __init__(self, opening: _OpenArguments, container: InputContainer, news: News) -> None:
        LiveCamera.__init__(self, opening.name, news, Retry())
        self._setup(opening, container, live=False)  # a file is never ahead of the decoder
        self._start_s: float | None = None
        self._waiting = False  # for the next frame's time
        self._thread.start()

    @property
    def without_picture_s(self) -> float:
        """See `Camera`."""
        return 0.0 if self._waiting else super().without_picture_s

    def _keep(self, frame: VideoFrame) -> None:
        position_s = frame.time or 0.0
        if self._start_s is None:
            self._start_s = time.monotonic() - position_s
        self._waiting = True
        self._closed.wait(max(0.0, self._start_s + position_s - time.monotonic()))
        super()._keep(frame)
        self._waiting = False

    def _position(self, frame: VideoFrame) -> float | None:
        return frame.time or 0.0

    def _is_current(self) -> bool:
        return True

    def _is_over(self) -> bool:
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        self._news(f"{self.name}: the recording has ended")
        return True


def _is_picture(container: InputContainer) -> bool:
    """Whether a source is a single picture. A sequence of JPEGs may be a stream."""
    name = container.format.name
    # AVIF and HEIC use the MP4 container. FFmpeg decodes only the first part: colours without
    # transparency, or one tile of many.
    brand = container.metadata.get("major_brand", "").strip()
    single = name == "image2" or (name.endswith("_pipe") and name != "jpeg_pipe")
    return single or brand in _PICTURE_BRANDS


def _reason(error: Exception, silence: str = f"no answer within {OPEN_TIMEOUT_S:g} s") -> str:
    """Return a one-line reason why a source cannot be read, without its address (password!)."""
    if isinstance(error, av.error.ExitError):
        return silence
    if isinstance(error, InvalidDataError):
        return "neither a picture nor a recording"
    reason = getattr(error, "strerror", None)
    return str(reason or type(error).__name__)
