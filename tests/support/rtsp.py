"""A real RTSP camera for tests: GStreamer's RTSP server, in a process of its own.

It comes from Debian (`make rtsp-server` installs it) and runs under Debian's own Python, for
which the bindings are packaged.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from pathlib import Path
from typing import Self

import pytest

PYTHON = "/usr/bin/python3"
SCRIPT = Path(__file__).with_name("rtsp_server.py")
_NEEDED = (
    "import gi; gi.require_version('GstRtspServer', '1.0'); "
    "from gi.repository import Gst, GstRtspServer; Gst.init(None); "
    "assert all(map(Gst.ElementFactory.find, ('filesrc', 'qtdemux', 'rtph264pay')))"
)
REASON = "GStreamer's RTSP server is not installed (run `make rtsp-server` as root)"


@functools.cache
def installed() -> bool:
    """Whether the server and the parts of GStreamer that it uses are installed."""
    try:
        return not subprocess.run([PYTHON, "-c", _NEEDED], capture_output=True).returncode
    except OSError:
        return False


def need_rtsp_server() -> None:
    """Skip the test where there is no RTSP server; in continuous integration there must be one."""
    if not installed():
        if os.environ.get("CI"):
            pytest.fail(REASON)
        pytest.skip(REASON)


class RtspCamera:
    """A camera that shows a recording to each of its clients, from the start.

    Attributes:
        url: its address.
    """

    def __init__(self, clip: Path) -> None:
        self._clip = clip
        self._port = "0"
        self._process: subprocess.Popen[str] | None = None
        self.plug_in()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self._port}/camera"

    def plug_in(self) -> None:
        """Start it, at the address that it had before."""
        process = subprocess.Popen(
            [PYTHON, str(SCRIPT), str(self._clip), self._port], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        self._process = process
        self._port = process.stdout.readline().strip()
        assert self._port.isdecimal(), "the RTSP server did not start"

    def unplug(self) -> None:
        """Kill it, without closing its connections."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def freeze(self) -> None:
        """Stop its process: connections stay open, but nothing is sent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it continue."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
