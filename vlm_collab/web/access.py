"""Access rules: the `Host` header, the `Origin` header, and the token.

`Gate` (in `gate`) applies three rules to every route of an application:

1. `Host`. Without a token, a server answers only to names that nobody else can own: loopback names,
   IP addresses, and names that the owner lists. This stops DNS rebinding: a page whose name was
   re-bound to this machine has the same origin as the server and could read its answers. With a
   token any name will do, since such a page does not know the token.
2. `Origin`. Browsers send the origin of the page; other clients send none. A page may use the
   server if this server served it, under a name that passes rule 1, or if its origin is listed.
   The files of our own page are sent to any origin, because browsers send an origin when a page
   loads its own modules. Behind a proxy that changes the `Host` header that origin does not match;
   the page must load all the same, so that it can show why the server refuses it.
3. The token, on all routes but the open ones (`is_open`).

Preflight requests of listed origins are answered before rule 3, because they carry no token.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from vlm_collab.errors import ConfigError
from vlm_collab.openai import ApiError
from vlm_collab.page import token_in
from vlm_collab.web.health import ALIVE, READY

_MOST_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The access rules of one server.

    Attributes:
        tokens: each of them opens all routes; with none, everyone may use the server.
        origins: origins of browser pages that may use it, besides its own.
        host_names: the server's names, besides loopback names, IP addresses and the names in
            `origins`, whose pages may read everything anyway.
        who: what the server is called in messages.
        option: how messages write an option, with `{name}`, `{names}` and `{value}`.
    """

    tokens: tuple[str, ...] = ()
    origins: frozenset[str] = frozenset()
    host_names: frozenset[str] = frozenset()
    who: str = "server"
    option: str = "--{name} {value}"

    def host_refusal(self, client: HTTPConnection) -> ApiError | None:
        """Why the `Host` header is refused; None if it is allowed."""
        host = client.headers.get("host")
        # All `Host` headers are checked: with two of them, one could be checked and the other used.
        # A request without any comes from a probe that speaks HTTP/1.0, not from a browser.
        if not self.tokens and not all(map(self._is_own_name, client.headers.getlist("host"))):
            name = _name_of(host or "") or "NAME"
            text = (
                f"this {self.who} does not answer to the name {_shortened(host or '')}: use "
                "localhost or an IP address, or start it with "
                f"{self._option_text('host-name', _shortened(name))} or with a token"
            )
            return _forbidden(text, "unknown_host")
        return None

    def origin_refusal(self, client: HTTPConnection) -> ApiError | None:
        """Why the `Origin` header is refused; None if it is allowed or missing."""
        origin = client.headers.get("origin")
        if origin is None or origin in self.origins:
            return None
        address = _address_of(origin)
        if address and address == client.headers.get("host"):
            return None
        shown = _shortened(origin)
        text = (
            f"pages at {shown} may not use this {self.who}, unless it is started with "
            f"{self._option_text('origin', shown)}"
        )
        return _forbidden(text, "origin_not_allowed")

    def token_refusal(self, client: HTTPConnection) -> ApiError | None:
        """Why the token is refused; None if it is right or none is needed.

        It comes in a header, or, since a page can set no header on a WebSocket, in a subprotocol.
        """
        if not self.tokens:
            return None
        scheme, _, given = client.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = token_in(client.scope.get("subprotocols", [])) or ""
        encoded = given.strip().encode()
        # All are compared, so that the time does not show which one is similar.
        matches = [hmac.compare_digest(encoded, token.encode()) for token in self.tokens]
        if any(matches):
            return None
        text = f"wrong or missing API key; use the token of this {self.who} as the key"
        return ApiError(401, text, "authentication_error", None, "invalid_api_key")

    def _option_text(self, name: str, value: str) -> str:
        return self.option.format(name=name, names=name.replace("-", "_") + "s", value=value)

    def _is_own_name(self, host: str) -> bool:
        name = _name_of(host)
        listed = name in self.host_names or name in map(_name_of, map(_address_of, self.origins))
        return bool(name) and (name == "localhost" or _is_address(name) or listed)


def is_open(path: str) -> bool:
    """Whether a route needs no token: health checks, and the files of the page.

    Args:
        path: relative to where the application is mounted.
    """
    if path in ("/", ALIVE, READY):
        return True
    return path.startswith("/page/") and path != "/page/access"


def checked_names(names: frozenset[str]) -> frozenset[str]:
    """Check host names and convert them to lower case.

    Raises:
        ConfigError: one is not a host name.
    """
    for name in names:
        if not name or _name_of(name) != name.lower() or "*" in name:
            raise ConfigError(
                f"--host-name takes a name without a port, such as camera.lan, not {name}"
            )
    return frozenset(name.lower() for name in names)


def _name_of(host: str) -> str:
    """The name in a `Host` header; empty if there is none."""
    if any(mark in host for mark in "@/?#\\"):
        return ""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _address_of(origin: str) -> str:
    """Host and port of an origin; empty if it has none, such as `null`."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shortened(text: str) -> str:
    """Text from a client, shortened for a message."""
    cut = text[:_MOST_SHOWN_CHARS] + ("…" if len(text) > _MOST_SHOWN_CHARS else "")
    return cut or "nothing"


def _forbidden(text: str, code: str) -> ApiError:
    return ApiError(403, text, "permission_error", None, code)
