"""Reading request bodies within bounds, inflated if they are compressed.

A few kilobytes can inflate to gigabytes. So the inflated body comes in small pieces, reading stops
at the bound, and the event loop runs between two pieces.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.requests import Request

from vlm_collab.openai import ApiError, refuse

PIECE_BYTES = 2**18
"""Most bytes of one inflated piece."""

_GZIP_OR_ZLIB, _RAW = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS


class BodyTooLargeError(Exception):
    """A request's body has more bytes than allowed."""


async def read_body(
    request: Request, max_bytes: int, received: Callable[[int], None], *, discard_bytes: int = 0
) -> bytes:
    """Read a request's body.

    Args:
        request: the request.
        max_bytes: largest inflated body, in bytes.
        received: called after each piece with the inflated bytes so far. It may raise.
        discard_bytes: if the body is too large, go on reading until it has more bytes than this
            and throw them away. A client that still sends does not read the refusal.

    Raises:
        BodyTooLargeError: the body has more than `max_bytes`.
        ApiError: see `body_pieces`.
        ClientDisconnect: the client left.
    """
    data, size = bytearray(), 0
    async for piece in body_pieces(request):
        size += len(piece)
        received(size)
        if size <= max_bytes:
            data += piece
        elif size > discard_bytes:
            break
    if size > max_bytes:
        raise BodyTooLargeError
    return bytes(data)


async def body_pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield a request's body, inflated if it is compressed with gzip or deflate.

    Raises:
        ApiError: it is compressed in another way (415), or the compressed data is broken (400).
        ClientDisconnect: the client left.
    """
    encodings = request.headers.get("content-encoding", "").lower().split(",")
    applied = [each for each in map(str.strip, encodings) if each not in ("", "identity")]
    if not applied:
        async for received in request.stream():
            yield received
        return
    if applied not in (["gzip"], ["x-gzip"], ["deflate"]):
        named = ", ".join(applied)[:100]
        raise refuse(
            None,
            f"cannot read requests compressed with {named!r}; use gzip, deflate or no compression",
            "unsupported_encoding",
            status=415,
        )
    inflater = _Inflater(applied[0])
    async for received in request.stream():
        for piece in inflater.feed(received):
            yield piece
            await asyncio.sleep(0)
    inflater.end()


class _Inflater:
    """Inflates one body."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._begun = b""
        self._zlib = None if encoding == "deflate" else zlib.decompressobj(_GZIP_OR_ZLIB)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Inflate more of the body, in pieces of at most `PIECE_BYTES`."""
        if self._zlib is None:
            self._begun += data
            if len(self._begun) < 2:
                return
            # By the standard, "deflate" is the zlib format; some programs send raw deflate.
            is_zlib = self._begun[0] & 15 == 8 and int.from_bytes(self._begun[:2]) % 31 == 0
            self._zlib = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else _RAW)
            data, self._begun = self._begun, b""
        piece = b""
        while data or len(piece) == PIECE_BYTES:
            if self._zlib.eof:
                if self._encoding == "deflate":
                    raise self._broken("there is data after its end")
                self._zlib = zlib.decompressobj(_GZIP_OR_ZLIB)  # gzip may have several members
            try:
                piece = self._zlib.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            data = self._zlib.unconsumed_tail or self._zlib.unused_data
            if piece:
                yield piece

    def end(self) -> None:
        """Refuse a truncated body."""
        if self._zlib is None or not self._zlib.eof:
            raise self._broken("it is cut short")

    def _broken(self, why: str) -> ApiError:
        return refuse(None, f"the request is not valid {self._encoding}: {why}", "invalid_encoding")
