"""The answer to a request for a route that does not exist."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from vlm_collab.openai import no_such_route


def unknown_routes(
    base_of: Callable[[str], str] = lambda path: "",
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Make an exception handler for `HTTPException`, which answers in OpenAI's format.

    Most clients that use a wrong address are OpenAI clients.

    Args:
        base_of: returns the prefix of `/v1` at a path, such as `/cameras/door`.
    """

    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        body = no_such_route(request.method, path, error.status_code, base=base_of(path))
        return Response(body.encoded(), body.status, error.headers, media_type="application/json")

    return handle
