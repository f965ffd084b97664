"""Bodies of requests as they were before they were compressed, within bounds.

A few kilobytes can be made into gigabytes, so what is inflated comes in small pieces, and whoever
counts them can stop at any. The event loop gets its turn between two.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request

from vlm_collab.openai import ApiError, refuse

PIECE_BYTES = 2**18
"""Most bytes of one inflated piece."""

_GZIP_OR_ZLIB, _RAW = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS


async def body_pieces(request: Request) -> AsyncIterator[bytes]:
    """A request's body, inflated if it was compressed with gzip or deflate.

    Raises:
        ApiError: it was compressed in another way (415), or is broken (400).
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
            f"requests compressed with {named!r} are not read here; send gzip, deflate, or none",
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
        """What more of the body comes to, in pieces of at most `PIECE_BYTES`."""
        if self._zlib is None:
            self._begun += data
            if len(self._begun) < 2:
                return
            # "deflate" is zlib's form by the standard, and bare in some programs.
            zlibs = self._begun[0] & 15 == 8 and int.from_bytes(self._begun[:2]) % 31 == 0
            self._zlib = zlib.decompressobj(zlib.MAX_WBITS if zlibs else _RAW)
            data, self._begun = self._begun, b""
        piece = b""
        while data or len(piece) == PIECE_BYTES:
            if self._zlib.eof:
                if self._encoding == "deflate":
                    raise self._broken("something follows its end")
                self._zlib = zlib.decompressobj(_GZIP_OR_ZLIB)  # gzip may have several members
            try:
                piece = self._zlib.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            data = self._zlib.unconsumed_tail or self._zlib.unused_data
            if piece:
                yield piece

    def end(self) -> None:
        """Refuse a body that broke off."""
        if self._zlib is None or not self._zlib.eof:
            raise self._broken("it breaks off")

    def _broken(self, why: str) -> ApiError:
        return refuse(None, f"the request is no {self._encoding}: {why}", "invalid_encoding")
