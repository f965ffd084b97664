"""Who may use a server: by which name, from which pages, and with which token.

One rule for every route of an application, in one place around all of them:

1. `Host`. Without a token only names are answered to that cannot be anybody else's: those of
   loopback, IP addresses, and names that the owner lists. A page whose name was re-bound to this
   machine is of "the same origin" as it and could read whatever is answered; an address cannot be
   re-bound. With a token any name will do, since no such page knows it.
2. `Origin`. Browsers name the page that asks; other clients send none. A page may ask if it was
   served by this very server, under a name that passes 1, or if its origin is listed. Files of our
   own page are let go to any, for browsers name a page that loads its own modules, too; it must be
   able to say what is wrong behind a proxy that calls the server by another name.
3. The token, on all but the routes that tell nobody's business (`is_open`).

Preflights of listed origins are answered before 3, for they carry no token.
"""

from __future__ import annotations

import enum
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from vlm_collab.errors import ConfigError
from vlm_collab.openai import ApiError
from vlm_collab.page import token_in

_METHODS = ("GET", "POST", "DELETE")
_MOST_SHOWN_CHARS = 100


class Form(enum.Enum):
    """How a refusal is worded."""

    JSON = "JSON"
    """As OpenAI has errors."""
    TEXT = "text"
    """As a line for people, for pages, probes and WebSockets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Whom a server lets in.

    Attributes:
        tokens: any one of them opens all routes; none lets everyone in who can connect.
        origins: origins of browser pages that may use it, beside its own.
        host_names: names that it is known by, beside loopback's, IP addresses and those of
            `origins`, whose pages may read everything in any case.
        who: what it calls itself.
        option: how an option is given, with `{name}`, `{names}` and `{value}` in it.
    """

    tokens: tuple[str, ...] = ()
    origins: frozenset[str] = frozenset()
    host_names: frozenset[str] = frozenset()
    who: str = "server"
    option: str = "--{name} {value}"

    def refusal_of_name(self, client: HTTPConnection) -> ApiError | None:
        """Why a client may use no route, by the name that it calls; None if it may."""
        host = client.headers.get("host")
        # Of two names one could be checked and the other used. None at all has only what is no
        # browser: a probe that speaks HTTP/1.0.
        if not self.tokens and not all(map(self._is_ours, client.headers.getlist("host"))):
            shown = _shown(host or "")
            name = _name_of(host or "") or "NAME"
            text = (
                f"this {self.who} is not called {shown}: use localhost or an IP address, or start "
                f"it with {self._given('host-name', _shown(name))}, or with a token"
            )
            return _forbidden(text, "unknown_host")
        return None

    def refusal_of_page(self, client: HTTPConnection) -> ApiError | None:
        """Why a client that is a page may not ask; None if it may, or is none."""
        origin = client.headers.get("origin")
        if origin is None or origin in self.origins:
            return None
        place = _place_of(origin)
        if place and place == client.headers.get("host"):
            return None
        shown = _shown(origin)
        text = (
            f"pages at {shown} may not use this {self.who}, unless it is started with "
            f"{self._given('origin', shown)}"
        )
        return _forbidden(text, "origin_not_allowed")

    def refusal_of_token(self, client: HTTPConnection) -> ApiError | None:
        """Why a client's token does not let it in: a header, or of a page, which can set none on a
        WebSocket, a subprotocol."""
        if not self.tokens:
            return None
        scheme, _, given = client.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = token_in(client.scope.get("subprotocols", [])) or ""
        encoded = given.strip().encode()
        # All are compared in any case, so that the time taken says nothing.
        same = [hmac.compare_digest(encoded, right.encode()) for right in self.tokens]
        if any(same):
            return None
        text = f"wrong or missing API key, which is this {self.who}'s token"
        return ApiError(401, text, "authentication_error", None, "invalid_api_key")

    def _given(self, name: str, value: str) -> str:
        return self.option.format(name=name, names=name.replace("-", "_") + "s", value=value)

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        listed = name in self.host_names or name in map(_name_of, map(_place_of, self.origins))
        return bool(name) and (name == "localhost" or _is_address(name) or listed)


class Gate:
    """ASGI middleware: lets those through to an application whom the rules let in.

    Args:
        app: the application, or a part of it.
        rules: see `Rules`.
        refused: told of each that is not let in.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        refused: Callable[[HTTPConnection, ApiError], None] = lambda client, error: None,
    ) -> None:
        self._app = app
        self._rules = rules
        self._refused = refused
        self._inner: ASGIApp = self._with_token
        if rules.origins:
            self._inner = CORSMiddleware(
                self._with_token,
                allow_origins=sorted(rules.origins),
                allow_methods=_METHODS,
                allow_headers=("*",),
                # A page on the internet that is listed may ask a server at home.
                allow_private_network=True,
                # When to come back, what was ignored: all that an answer says of itself.
                expose_headers=("*",),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client = HTTPConnection(scope)
        error = self._rules.refusal_of_name(client)
        if error is None and not _is_file(scope):
            error = self._rules.refusal_of_page(client)
        if error is not None:
            await self._refuse(error, scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    async def _with_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] != "http" or not is_open(_path_of(scope)):
            error = self._rules.refusal_of_token(HTTPConnection(scope))
        if error is not None:
            await self._refuse(error, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        client = HTTPConnection(scope)
        self._refused(client, error)
        if scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.send_denial_response(response_of(error, Form.TEXT))
        else:
            await response_of(error, form_of(_path_of(scope)))(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a route is answered without the token: what is alive, and the page's own files,
    which ask for the token.

    Args:
        path: relative to where the application lies.
    """
    if path in ("/", "/healthz", "/readyz"):
        return True
    return path.startswith("/page/") and path != "/page/access"


def _is_file(scope: Scope) -> bool:
    """Whether a file of the page is asked for."""
    path = _path_of(scope)
    return scope["type"] == "http" and is_open(path) and (path == "/" or path.startswith("/page/"))


def form_of(path: str) -> Form:
    """How a route words its refusals."""
    return Form.TEXT if is_open(path) or path in ("/page/access", "/metrics") else Form.JSON


def response_of(error: ApiError, form: Form) -> Response:
    """A refusal as a response."""
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if form is Form.TEXT:
        return PlainTextResponse(str(error), error.status, headers)
    return Response(error.encoded(), error.status, headers, media_type="application/json")


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def checked_names(names: frozenset[str]) -> frozenset[str]:
    """Names of a host as they are compared.

    Raises:
        ConfigError: one is no name.
    """
    for name in names:
        if not name or _name_of(name) != name.lower() or "*" in name:
            raise ConfigError(
                f"--host-name takes a name without a port, such as camera.lan, not {name}"
            )
    return frozenset(name.lower() for name in names)


def _path_of(scope: Scope) -> str:
    """A request's path, relative to where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _name_of(host: str) -> str:
    """The name in a `Host` header, or the empty text for what is none."""
    if any(mark in host for mark in "@/?#\\"):
        return ""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _place_of(origin: str) -> str:
    """Host and port of a page's origin; the empty text for what is none, such as `null`."""
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


def _shown(text: str) -> str:
    """What a client says of itself, cut where it is too long to read."""
    cut = text[:_MOST_SHOWN_CHARS] + ("…" if len(text) > _MOST_SHOWN_CHARS else "")
    return cut or "nothing"


def _forbidden(text: str, code: str) -> ApiError:
    return ApiError(403, text, "permission_error", None, code)
