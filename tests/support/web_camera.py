"""A camera on a web server, for tests; its behaviour can be changed at any time."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Callable
from functools import partial
from typing import Self

BOUNDARY = "frame"


class Request:
    """One request that a behaviour answers.

    Attributes:
        path, authorization: of the request.
        over: set when the camera is switched off or changes its behaviour.
    """

    def __init__(self, handler: http.server.BaseHTTPRequestHandler, over: threading.Event) -> None:
        self.path = handler.path
        self.authorization = handler.headers.get("Authorization", "")
        self.over = over
        self._handler = handler

    def head(self, status: int = 200, **headers: object) -> None:
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), str(value))
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)


Behaviour = Callable[[Request], None]


def picture(data: bytes, kind: str = "image/jpeg") -> Behaviour:
    """One picture, whole."""
    return part_of(data, len(data), kind, sized=True)


def part_of(data: bytes, size: int, kind: str = "image/jpeg", *, sized: bool) -> Behaviour:
    """Send the beginning of a picture; `sized` announces the length of the whole."""

    def behave(request: Request) -> None:
        sizes = {"Content_Length": len(data)} if sized else {}
        request.head(Content_Type=kind, **sizes)
        request.send(data[:size])

    return behave


def page(text: str, status: int = 200) -> Behaviour:
    """A page, as cameras show it when they are busy."""

    def behave(request: Request) -> None:
        request.head(status, Content_Type="text/html; charset=utf-8")
        request.send(f"<html><body>{text}</body></html>".encode())

    return behave


def silence(begin: bytes | None = None, kind: str = "image/jpeg") -> Behaviour:
    """No answer; or the beginning of one, and then nothing."""

    def behave(request: Request) -> None:
        if begin is not None:
            request.head(Content_Type=kind)
            request.send(begin)
        request.over.wait()

    return behave


def trickle(data: bytes) -> Behaviour:
    """A picture, byte by byte."""

    def behave(request: Request) -> None:
        request.head(Content_Type="image/jpeg")
        for index in range(len(data)):
            request.send(data[index : index + 1])
            if request.over.wait(0.02):
                return

    return behave


def stream(*pictures: bytes, interval_s: float = 0.05) -> Behaviour:
    """A motion JPEG stream that repeats these pictures."""

    def behave(request: Request) -> None:
        request.head(Content_Type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        index = 0
        while True:
            data = pictures[index % len(pictures)]
            head = (
                f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            request.send(head.encode() + data + b"\r\n")
            index += 1
            if request.over.wait(interval_s):
                return

    return behave


def silent_stream() -> Behaviour:
    """A motion JPEG stream without a picture."""
    return silence(f"--{BOUNDARY}\r\n".encode(), f"multipart/x-mixed-replace; boundary={BOUNDARY}")


class WebCamera:
    """The camera.

    ::

        with WebCamera(picture(data)) as camera:
            ... camera.url ...
            camera.do(page("Device Busy"))

    Attributes:
        url: of its picture.
        requests: how many there were.
    """

    def __init__(self, behaviour: Behaviour, *, tls: ssl.SSLContext | None = None) -> None:
        self._now = behaviour, threading.Event()  # replaced as one
        self.requests = 0
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.requests += 1
                with contextlib.suppress(ConnectionError):
                    behave, over = camera._now
                    behave(Request(self, over))

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=partial(self._server.serve_forever, 0.02))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}/snapshot.jpg"

    def do(self, behaviour: Behaviour) -> None:
        """Change the behaviour; running requests end."""
        _, over = self._now
        self._now = behaviour, threading.Event()
        over.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._now[1].set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
