"""Fetch a picture from a camera's web server.

Only addresses that a user of this device gave are fetched. Redirects are followed. Name and
password are sent only to the host and port of the address, by basic or digest authentication as
the server asks. Certificates are not checked: most cameras have self-signed ones.
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
"""A fetch fails after the server has sent nothing for this time."""

TOTAL_S = 60.0
"""Longest time for one picture, even if data keep coming."""

_HEAD_BYTES = 32  # enough to recognise a picture format
_STREAMS = ("multipart/", "video/", "audio/")
_KIND = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}/[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True, slots=True)
class FetchedContent:
    """The body of a successful HTTP response.

    Attributes:
        kind: media type in lower case; empty if the response names none.
        picture: the whole body, if it begins like a JPEG, PNG or WebP picture; else None, and
            only its first bytes were read.
        empty: there is no body.
    """

    kind: str
    picture: bytes | None = None
    empty: bool = False

    @property
    def page(self) -> bool:
        """Whether it is text, such as a web page or a JSON message."""
        return self.kind.startswith("text/") or self.kind == "application/json"

    @property
    def other_picture(self) -> bool:
        """Whether it claims to be a picture of an unsupported format."""
        return self.picture is None and self.kind.startswith("image/") and self.kind != "image/jpeg"

    @property
    def fault(self) -> str:
        """Reason why it is not a picture; without its content, which may repeat a password."""
        if self.empty:
            return "the response is empty"
        return f"the response is {self.kind or 'something else'}, not a JPEG, PNG or WebP picture"


class PictureUrl:
    """The URL of a picture, fetched again and again by one thread.

    Args:
        url: `http://` or `https://`, with or without name and password.
    """

    def __init__(self, url: str) -> None:
        self._url, name, password = _split_url(url)
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        if name:
            passwords.add_password(None, self._url, name, password)
            root = urlunsplit(urlsplit(self._url)._replace(path="/", query=""))
            passwords.add_password(None, root, name, password)
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(self._keep_socket),
            _Https(self._keep_socket),
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
        """Fetch once.

        Raises:
            CameraError: no response, or an incomplete one; the message does not contain the
                address.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._shut_socket()

        timer = threading.Timer(TOTAL_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            reply = self._fetch()
        except CameraError:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            self._close_socket()
        if late.is_set():  # a body that was cut off may look complete
            raise CameraError(f"the response was not complete after {TOTAL_S:g} s")
        return reply

    def stop(self) -> None:
        """Stop fetching; a running `fetch` ends with an error. Any thread may call this."""
        self._stopped = True
        self._shut_socket()

    def _fetch(self) -> FetchedContent:
        try:
            with self._opener.open(self._url, timeout=SILENCE_S) as response:
                return _read(response)
        except HTTPError as error:
            error.close()
            raise CameraError(f"HTTP {error.code} {error.reason}".strip()) from None
        except URLError as error:
            raise CameraError(_reason(error.reason)) from None
        except http.client.BadStatusLine:
            return FetchedContent("")  # some streams begin with their own status line
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CameraError(_reason(error)) from None

    def _keep_socket(self, connection: socket.socket) -> None:
        """Keep a duplicate of a new connection's socket, so that a waiting read can be ended."""
        self._close_socket()
        with self._lock:
            self._socket = connection.dup()
        if self._stopped:
            self._shut_socket()

    def _shut_socket(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _close_socket(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _read(response: http.client.HTTPResponse) -> FetchedContent:
    """Read a response's body if it is a picture.

    Raises:
        CameraError: the picture is too large or incomplete.
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
            raise CameraError(f"the picture has more than {MAX_BYTES >> 20} MiB")
    if response.length:  # announced bytes that did not arrive
        raise CameraError(
            f"the picture was cut off after {len(data)} of {len(data) + response.length} bytes"
        )
    return FetchedContent(kind, bytes(data))


_OnConnect = Callable[[socket.socket], None]


class _HttpConnection(http.client.HTTPConnection):
    """Passes its socket to `on_connect` as soon as it is connected."""

    on_connect: _OnConnect

    def connect(self) -> None:
        super().connect()
        self.on_connect(self.sock)


class _HttpsConnection(http.client.HTTPSConnection, _HttpConnection):
    """The same; `on_connect` is called before TLS begins."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, on_connect: _OnConnect) -> None:
        super().__init__()
        self._on_connect = on_connect

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        connection = _HttpConnection(host, **options)
        connection.on_connect = self._on_connect
        return connection


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, on_connect: _OnConnect) -> None:
        super().__init__()
        self._on_connect = on_connect
        self._unchecked = ssl.create_default_context()
        self._unchecked.check_hostname = False
        self._unchecked.verify_mode = ssl.CERT_NONE

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, /, **options: Any) -> http.client.HTTPConnection:
        connection = _HttpsConnection(host, context=self._unchecked, **options)
        connection.on_connect = self._on_connect
        return connection


# The library's handlers raise an error if the server asks for another scheme. Here the other
# handler gets its turn; if it fails too, the result is HTTP 401.
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


def _split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into the URL to request, the user name and the password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    unquoted = "%/:=&?~#+!$,;'@()*[]"
    requested = parts._replace(
        netloc=host,
        path=quote(parts.path or "/", safe=unquoted),
        query=quote(parts.query, safe=unquoted),
        fragment="",
    )
    return urlunsplit(requested), unquote(parts.username or ""), unquote(parts.password or "")


def _reason(error: object) -> str:
    """Return a one-line reason for a failure, without the address (it may hold a password)."""
    if isinstance(error, TimeoutError):
        return f"no data for {SILENCE_S:g} s"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without a response"
    if isinstance(error, http.client.IncompleteRead):
        return "the response was cut off"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "the response is not valid HTTP"
