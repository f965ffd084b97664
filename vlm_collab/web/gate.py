"""The middleware that applies the access rules."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from vlm_collab.openai import ApiError
from vlm_collab.web.access import Rules, is_open
from vlm_collab.web.refusals import RefusalFormat, format_of, response_of

_METHODS = ("GET", "POST", "DELETE")


class Gate:
    """ASGI middleware that applies the access rules to an application.

    Args:
        app: the application, or a part of it.
        rules: see `Rules`.
        refused: called with each refused client.
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
                # A listed page on the internet may use a server in a private network.
                allow_private_network=True,
                # Such as Retry-After, and the header that lists ignored parameters.
                expose_headers=("*",),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client = HTTPConnection(scope)
        error = self._rules.host_refusal(client)
        if error is None and not _is_file(scope):
            error = self._rules.origin_refusal(client)
        if error is not None:
            await self._refuse(error, scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    async def _with_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] != "http" or not is_open(_path_of(scope)):
            error = self._rules.token_refusal(HTTPConnection(scope))
        if error is not None:
            await self._refuse(error, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        client = HTTPConnection(scope)
        self._refused(client, error)
        if scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.send_denial_response(response_of(error, RefusalFormat.TEXT))
        else:
            await response_of(error, format_of(_path_of(scope)))(scope, receive, send)


def _is_file(scope: Scope) -> bool:
    """Whether the request is for a file of the page."""
    path = _path_of(scope)
    return scope["type"] == "http" and is_open(path) and (path == "/" or path.startswith("/page/"))


def _path_of(scope: Scope) -> str:
    """A request's path, relative to where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
