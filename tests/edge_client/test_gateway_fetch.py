"""Pictures are fetched only from hosts that the owner allowed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from edge_client.gateway.fetch import Fetcher
from vlm_collab.openai import ApiError, Url

PICTURE = b"\xff\xd8 a picture"


class Web:
    """A web server whose responses a test sets.

    Attributes:
        requests: heads of the received requests.
    """

    def __init__(self) -> None:
        self.replies: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        reply = self.replies[head.split(" ")[1]]
        if reply == b"silence":
            await reader.read()
        writer.write(reply)
        writer.close()


def ok(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + content


def moved(where: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


@asynccontextmanager
async def web() -> AsyncIterator[Web]:
    site = Web()
    async with await asyncio.start_server(site.answer, "127.0.0.1", 0) as server:
        site.port = server.sockets[0].getsockname()[1]
        yield site


@asynccontextmanager
async def fetching(*hosts: str, timeout_s: float = 5.0) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(hosts, timeout_s=timeout_s, max_bytes=1000)
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def refused(fetcher: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await fetcher.fetch(Url(url), "image_url")
    assert caught.value.param == "image_url"
    assert caught.value.status == 400
    return caught.value


async def test_a_picture_is_fetched_from_an_allowed_host():
    async with web() as server, fetching(f"127.0.0.1:{server.port}") as fetcher:
        server.replies["/a.jpg?b=c"] = ok(PICTURE)
        url = f"http://127.0.0.1:{server.port}/a.jpg?b=c"
        assert await fetcher.fetch(Url(url), "image_url") == PICTURE
        head = server.requests[0].lower()
        assert f"host: 127.0.0.1:{server.port}\r\n" in head
        for private in ("authorization", "cookie", "referer"):
            assert private not in head


async def test_a_name_at_a_private_address_needs_that_address_allowed_too():
    async with web() as server:
        server.replies["/"] = ok(PICTURE)
        url = f"http://localhost:{server.port}/"
        async with fetching(f"localhost:{server.port}") as fetcher:
            error = await refused(fetcher, url)
            assert "--allow-host 127.0.0.1 as well" in str(error) or "::1" in str(error)
        assert not server.requests
        async with fetching(f"localhost:{server.port}", "127.0.0.1", "::1") as fetcher:
            assert await fetcher.fetch(Url(url), "image_url") == PICTURE
            assert f"host: localhost:{server.port}\r\n" in server.requests[0].lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.jpg",
        "https://other.example:8443/a.jpg",
        "http://named.example:81/a.jpg",
        "http://127.0.0.1/a.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://2130706433/",
        "http://named.example.evil.example/",
        "http://named.example@evil.example/",
        "http://me:secret@named.example/",
        "http:///a.jpg",
        "http://",
        "http://[::1",
        "http://named.example:99999/",
        "ftp://named.example/a",
    ],
)
async def test_hosts_that_are_not_allowed_get_no_request(url: str, monkeypatch: pytest.MonkeyPatch):
    def refuse_lookup(*_: object, **__: object) -> None:
        raise AssertionError("a name that was not allowed was looked up")

    async with fetching("named.example") as fetcher:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", refuse_lookup)
        assert (await refused(fetcher, url)).type == "invalid_request_error"


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3",
        "192.168.0.9",
        "127.0.0.9",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%1",
        "fd00::1",
        "::ffff:10.0.0.1",
    ],
)
async def test_a_name_that_resolves_to_a_private_address_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
):
    async def bound(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async with fetching("named.example") as fetcher:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", bound)
        error = await refused(fetcher, "http://named.example/a.jpg")
        assert error.code == "image_url_not_allowed"
        assert "not a public address" in str(error)


async def test_redirects_stay_on_the_host():
    async with web() as server, fetching(f"127.0.0.1:{server.port}", "127.0.0.1") as fetcher:
        base = f"http://127.0.0.1:{server.port}"
        server.replies["/a"] = moved("/b")
        server.replies["/b"] = moved(f"{base}/c")
        server.replies["/c"] = ok(PICTURE)
        assert await fetcher.fetch(Url(f"{base}/a"), "image_url") == PICTURE
        server.replies["/away"] = moved(f"http://localhost:{server.port}/c")
        assert "redirects to another host" in str(await refused(fetcher, f"{base}/away"))
        server.replies["/port"] = moved(f"http://127.0.0.1:{server.port + 1}/c")
        assert "may not fetch from" in str(await refused(fetcher, f"{base}/port"))
        server.replies["/round"] = moved("/round")
        assert "more than 3 redirects" in str(await refused(fetcher, f"{base}/round"))
        server.replies["/nowhere"] = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"
        assert "302" in str(await refused(fetcher, f"{base}/nowhere"))


async def test_failed_and_too_large_fetches_are_refused():
    async with web() as server, fetching(f"127.0.0.1:{server.port}", timeout_s=0.3) as fetcher:
        base = f"http://127.0.0.1:{server.port}"
        server.replies["/large"] = ok(b"x" * 1001)
        assert (await refused(fetcher, f"{base}/large")).code == "image_too_large"
        server.replies["/gone"] = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        assert "HTTP 404" in str(await refused(fetcher, f"{base}/gone"))
        server.replies["/silent"] = b"silence"
        assert "within 0.3 s" in str(await refused(fetcher, f"{base}/silent"))
        server.replies["/junk"] = b"junk\r\n\r\n"
        assert "cannot be fetched" in str(await refused(fetcher, f"{base}/junk"))
    async with fetching(f"127.0.0.1:{server.port}") as fetcher:
        assert "cannot be fetched" in str(await refused(fetcher, f"{base}/a"))
