"""Routes of the browser page: its files, and whether its WebSocket may connect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vlm_collab.page import HEADERS, INDEX, page_file

Refusal = Callable[[HTTPConnection], Awaitable[Response | None]]
"""Returns why a client may not connect; None if it may."""


def page_routes(refusal: Refusal, *, off: str | None = None) -> list[Route]:
    """Routes of the page, relative to where it is mounted.

    Args:
        refusal: answers `POST page/access`. The page asks there before it connects, because a
            browser does not say why a WebSocket failed.
        off: if given, no file is served (403); the response is this text.
    """

    async def _file(request: Request) -> Response:
        if off is not None:
            return PlainTextResponse(off, 403, HEADERS)
        name = request.path_params.get("path")
        found = page_file(INDEX if name is None else f"page/{name}")
        if found is None:
            return PlainTextResponse("not found", 404, HEADERS)
        headers = {**HEADERS, "ETag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return Response(None, 304, headers)
        return Response(found.content, 200, headers, found.media_type)

    async def access(request: Request) -> Response:
        response = await refusal(request) or Response(None, 204)
        response.headers.update({**HEADERS, "Cache-Control": "no-store"})
        return response

    return [
        Route("/", _file),
        Route("/page/access", access, methods=["POST"]),
        Route("/page/{path:path}", _file),
    ]
