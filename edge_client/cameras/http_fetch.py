"""What an address on a camera's web server gives: a picture, or something else.

Only addresses that somebody named on this device are asked for. Redirects are followed; name and
password go to the host and port of the address alone, by the scheme that its server wants (basic
or digest). Certificates are not checked: those of cameras are mostly their own.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from edge_client.cameras.base import CameraError
from vlm_collab import __version__
from vlm_collab.pictures.headers import identify

MAX_BYTES = 64 << 20
"""Most bytes of one picture."""

SILENCE_S = 10.0
"""A server that sends nothing for so long is given up."""

WHOLE_S = 60.0
"""Time for one picture, however steadily it trickles."""

_HEAD_BYTES = 32  # enough to know a picture by
_STREAMS = ("multipart/", "video/", "audio/")
_KIND = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}/[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True, slots=True)
class FetchedContent:
    """An answer to a request that succeeded.

    Attributes:
        kind: its media type in lower case; empty if it names none.
        picture: all of it, if it begins like a JPEG, PNG or WebP picture; else None, and only its
            first bytes were read.
        empty: it has no content.
    """

    kind: str
    picture: bytes | None = None
    empty: bool = False

    @property
    def page(self) -> bool:
        """Whether it is something for people to read."""
        return self.kind.startswith("text/") or self.kind == "application/json"

    @property
    def other_picture(self) -> bool:
        """Whether it says that it is a picture of another format."""
        return self.picture is None and self.kind.startswith("image/") and self.kind != "image/jpeg"

    @property
    def fault(self) -> str:
        """Why it is no picture. Nothing of the content: a page may repeat a password."""
        if self.empty:
            return "the answer is empty"
        return f"the answer is {self.kind or 'something'} and no JPEG, PNG or WebP picture"


class PictureUrl:
    """An address, asked again and again by one thread.

    Args:
        url: `http://` or `https://`, with name and password or without.
    """

    def __init__(self, url: str) -> None:
        self._url, name, password = _parted(url)
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        if name:
            passwords.add_password(None, self._url, name, password)
            root = urlunsplit(urlsplit(self._url)._replace(path="/", query=""))
            passwords.add_password(None, root, name, password)
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(self._connected),
            _Https(self._connected),
            urllib.request.HTTPRedirectHandler(),
            _Basic(passwords),
            _Digest(passwords),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)
        self._opener.addheaders = [("User-Agent", f"vlm-collab/{__version__}"), ("Accept", "*/*")]
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = False

    def fetch(self) -> FetchedContent:
        """Ask once.

        Raises:
            CameraError: there is no answer, or not all of it came; the message does not say from
                where.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._shut()

        timer = threading.Timer(WHOLE_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            reply = self._fetched()
        except CameraError:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            self._forget()
        if late.is_set():  # what came until then may look like all of it
            raise CameraError(f"the answer was not complete after {WHOLE_S:g} s")
        return reply

    def stop(self) -> None:
        """Ask no more; a `fetch` under way ends with an error. Any thread may."""
        self._stopped = True
        self._shut()

    def _fetched(self) -> FetchedContent:
        try:
            with self._opener.open(self._url, timeout=SILENCE_S) as response:
                return _read(response)
        except HTTPError as error:
            error.close()
            raise CameraError(f"HTTP {error.code} {error.reason}".strip()) from None
        except URLError as error:
            raise CameraError(_why(error.reason)) from None
        except http.client.BadStatusLine:
            return FetchedContent("")  # some streams begin in their own way
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CameraError(_why(error)) from None

    def _connected(self, connection: socket.socket) -> None:
        """Keep a hand on a new connection, so that whoever waits for it can be woken."""
        self._forget()
        with self._lock:
            self._socket = connection.dup()
        if self._stopped:
            self._shut()

    def _shut(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _read(response: http.client.HTTPResponse) -> FetchedContent:
    """The content of an answer, if it is a picture.

    Raises:
        CameraError: it is too long, or breaks off.
    """
    found = _KIND.match(response.headers.get("Content-Type", "").strip().lower())
    kind = found.group() if found else ""
    if kind.startswith(_STREAMS):
        return FetchedContent(kind)
    data = bytearray(response.read(_HEAD_BYTES))
    if identify(bytes(data)) is None:
        return FetchedContent(kind, empty=not data)
    while piece := response.read(1 << 16):
        data += piece
        if len(data) > MAX_BYTES:
            raise CameraError(f"a picture of more than {MAX_BYTES >> 20} MiB")
    if response.length:  # what was promised and did not come
        raise CameraError(
            f"the picture broke off after {len(data)} of {len(data) + response.length} bytes"
        )
    return FetchedContent(kind, bytes(data))


_Shown = Callable[[socket.socket], None]


class _HttpConnection(http.client.HTTPConnection):
    """Shows its connection as soon as there is one."""

    shown: _Shown

    def connect(self) -> None:
        super().connect()
        self.shown(self.sock)


class _HttpsConnection(http.client.HTTPSConnection, _HttpConnection):
    """The same; the connection is shown before TLS begins."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, shown: _Shown) -> None:
        super().__init__()
        self._shown = shown

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        connection = _HttpConnection(host, **options)
        connection.shown = self._shown
        return connection


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, shown: _Shown) -> None:
        super().__init__()
        self._shown = shown
        self._unchecked = ssl.create_default_context()
        self._unchecked.check_hostname = False
        self._unchecked.verify_mode = ssl.CERT_NONE

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        connection = _HttpsConnection(host, context=self._unchecked, **options)
        connection.shown = self._shown
        return connection


# A server that wants another scheme than theirs is an error to the library's handlers; here the
# other handler has its turn, and after that the answer is what it is: HTTP 401.
class _Basic(urllib.request.HTTPBasicAuthHandler):
    def http_error_401(self, *args: Any) -> http.client.HTTPResponse | None:
        with contextlib.suppress(ValueError):
            return super().http_error_401(*args)
        return None


class _Digest(urllib.request.HTTPDigestAuthHandler):
    def http_error_401(self, *args: Any) -> http.client.HTTPResponse | None:
        with contextlib.suppress(ValueError):
            return super().http_error_401(*args)
        return None


def _parted(url: str) -> tuple[str, str, str]:
    """An address as it is asked for, and the name and password in it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    keep = "%/:=&?~#+!$,;'@()*[]"
    asked = parts._replace(
        netloc=host,
        path=quote(parts.path or "/", safe=keep),
        query=quote(parts.query, safe=keep),
        fragment="",
    )
    return urlunsplit(asked), unquote(parts.username or ""), unquote(parts.password or "")


def _why(error: object) -> str:
    """One line about a failure; never an address, which may hold a password."""
    if isinstance(error, TimeoutError):
        return f"nothing came for {SILENCE_S:g} s"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer broke off"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it does not answer as a web server does"
