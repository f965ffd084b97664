"""Routes of the browser page, as the service mounts them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import Route

from vlm_collab.web import page_routes as web


def page_routes(refusal: Callable[[HTTPConnection], Response | None]) -> list[Route]:
    """Routes of the page, relative to where it is mounted.

    Args:
        refusal: returns why a client may not connect; None if it may.
    """

    async def checked(client: HTTPConnection) -> Response | None:
        return refusal(client)

    return web.page_routes(checked)
