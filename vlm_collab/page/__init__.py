"""The browser page: its files, and the headers with which they are served.

Plain ES modules, one style sheet and no build step. `vlm_collab.web.page_routes` serves the page:
`GET` for `INDEX` and for the files below `page/`, with `HEADERS`, and `POST page/access`, which
says whether this client may connect. The page derives its WebSocket's address from its own: if it
is mounted below `/v1/collab`, that path itself; otherwise `/v1/collab` beside it.

A browser cannot set headers on a WebSocket, so the page sends its token as a second subprotocol
(`token_in`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import NamedTuple

INDEX = "index.html"

TOKEN_SUBPROTOCOL = "vlm-collab.token."
"""Prefix of the subprotocol that carries a token in base64url without padding."""

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        # Only this server's own files, no inline code, and no embedding in other pages.
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self'",
                "img-src 'self' blob:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        ),
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
        # Revalidated each time by the ETag, so that a new version is used at once.
        "Cache-Control": "no-cache",
    }
)
"""Sent with every file of the page."""

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class PageFile(NamedTuple):
    """A file of the page.

    Attributes:
        content: the file's bytes.
        media_type: for the `Content-Type` header.
        etag: for the `ETag` header, quotes included; changes with the content.
    """

    content: bytes
    media_type: str
    etag: str


def page_file(path: str) -> PageFile | None:
    """Look up a file by its path relative to the page, such as `INDEX` or `page/main.js`.

    Paths are looked up in a table, so that nothing a client sends reaches a file system.
    """
    return _files().get(path)


def page_paths() -> tuple[str, ...]:
    """The paths of all files of the page."""
    return tuple(_files())


def token_in(subprotocols: Iterable[str]) -> str | None:
    """Find the token among the subprotocols that a client offers.

    Returns:
        the token; None if there is none; the empty string, which never is a valid token, if it is
        not base64url of UTF-8 text.
    """
    for offered in subprotocols:
        if offered.startswith(TOKEN_SUBPROTOCOL):
            carried = offered.removeprefix(TOKEN_SUBPROTOCOL)
            try:
                padded = carried + "=" * (-len(carried) % 4)
                return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
            except (binascii.Error, ValueError):
                return ""
    return None


@cache
def _files() -> dict[str, PageFile]:
    found: dict[str, PageFile] = {}

    def collect(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda each: each.name):
            if entry.is_dir():
                collect(entry, f"{prefix}{entry.name}/")
                continue
            media_type = _MEDIA_TYPES.get(entry.name.rpartition(".")[2])
            if media_type is not None:
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                found[f"{prefix}{entry.name}"] = PageFile(content, media_type, etag)

    collect(resources.files(__package__) / "static", "")
    return found
