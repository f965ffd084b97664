"""The browser page as routes: its files, and why a WebSocket of it would be refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vlm_collab.page import HEADERS, INDEX, page_file

Refusal = Callable[[HTTPConnection], Response | None]
"""Why a client may not connect; None if it may."""


def page_routes(refusal: Refusal) -> list[Route]:
    """Routes of the page, relative to where it lies.

    Args:
        refusal: asked on behalf of the page, which learns nothing from a WebSocket that failed.
    """
    return [
        Route("/", _file),
        Route("/page/access", _access(refusal), methods=["POST"]),
        Route("/page/{path:path}", _file),
    ]


async def _file(request: Request) -> Response:
    name = request.path_params.get("path")
    file = page_file(INDEX if name is None else f"page/{name}")
    if file is None:
        return PlainTextResponse("not found", 404, HEADERS)
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(None, 304, headers)
    return Response(file.content, 200, headers, file.media_type)


def _access(refusal: Refusal) -> Callable[[Request], Awaitable[Response]]:
    async def access(request: Request) -> Response:
        response = refusal(request) or Response(None, 204)
        response.headers.update({**HEADERS, "Cache-Control": "no-store"})
        return response

    return access
