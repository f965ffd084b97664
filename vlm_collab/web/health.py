"""Health checks: whether the process is alive, and whether the server is ready for questions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vlm_collab import __version__

ALIVE, READY = "/healthz", "/readyz"


class Readiness(NamedTuple):
    """Whether a server is ready for questions.

    Attributes:
        ready: questions would be answered now.
        model: name of the model; None if it is not known.
    """

    ready: bool
    model: str | None


def health_routes(readiness: Callable[[], Awaitable[Readiness]]) -> list[Route]:
    """Routes of the health checks; `READY` has status 503 if the server is not ready."""

    async def alive(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def ready(_: Request) -> Response:
        found = await readiness()
        body = {"ready": found.ready, "model": found.model, "version": __version__}
        status = 200 if found.ready else 503
        return Response(msgspec.json.encode(body), status, media_type="application/json")

    return [Route(ALIVE, alive), Route(READY, ready)]
