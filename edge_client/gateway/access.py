"""Who may use the gateway: the API key, pages of other origins, and names bound to this machine."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from edge_client.gateway.config import GatewayConfig, is_loopback
from vlm_collab.openai import ApiError
from vlm_collab.page import token_in


class Access:
    """Decides on each request by its headers.

    Args:
        config: see `GatewayConfig`.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    def refusal(self, client: HTTPConnection) -> ApiError | None:
        """Why a client may not ask; None if it may."""
        if not self._known_host(client):
            # A page whose name was re-bound to this machine is of "the same origin" as it.
            host = client.headers.get("host", "")
            return _forbidden(f"this gateway is not called {host}; use localhost", "unknown_host")
        if not self._origin_allowed(client):
            origin = client.headers["origin"]
            return _forbidden(
                f"pages at {origin} may not use this gateway, "
                f"unless it is started with --origin {origin}",
                "origin_not_allowed",
            )
        if not self._has_key(client):
            return ApiError(
                401,
                "wrong or missing API key",
                "authentication_error",
                None,
                "invalid_api_key",
            )
        return None

    def _known_host(self, client: HTTPConnection) -> bool:
        """Without a key, only names that cannot be anybody else's are answered to.

        Beyond loopback without a key (`allow_anonymous`) the names of this machine are not known.
        """
        config = self._config
        if config.api_key is not None or not is_loopback(config.host):
            return True
        return is_loopback(_host_of(f"//{client.headers.get('host', '')}"))

    def _origin_allowed(self, client: HTTPConnection) -> bool:
        """Browsers name the page that asks; other clients send no origin."""
        origin = client.headers.get("origin")
        if origin is None or origin in self._config.origins:
            return True
        place = _place_of(origin)
        if not place or place != client.headers.get("host"):
            return False
        return self._config.api_key is not None or is_loopback(_host_of(origin))

    def _has_key(self, client: HTTPConnection) -> bool:
        """The key comes as a header; from the page, which cannot set any, as a subprotocol."""
        key = self._config.api_key
        if key is None:
            return True
        scheme, _, given = client.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = token_in(client.scope.get("subprotocols", [])) or ""
        return hmac.compare_digest(given.strip().encode(), key.encode())


def _place_of(origin: str) -> str:
    """Host and port of a page's origin; the empty text for what is none, such as `null`."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _forbidden(text: str, code: str) -> ApiError:
    return ApiError(403, text, "permission_error", None, code)
