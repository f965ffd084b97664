"""The table of docs/access.md: what each route of each server requires, found by requests.

`python -m tests.support.access_table` updates the page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.types import Message

from edge_client.gateway import Gateway, GatewayConfig
from server_plugin.backends.fake import FakeBackend
from server_plugin.service.config import OpenAiLimits
from server_plugin.vllm_server.endpoint import routes_of
from tests.support.wire import service
from vlm_collab.openai import WireLimits
from vlm_collab.protocol.messages import SUBPROTOCOL

PAGE = Path(__file__).parents[2] / "docs" / "access.md"
BEGIN, END = "<!-- routes: begin -->\n", "<!-- routes: end -->\n"
TOKEN = "right"
FOREIGN_NAME = {"Host": "evil.example"}
FOREIGN_PAGE = {"Origin": "https://evil.example"}
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
MOST_BYTES = {
    "vlm-collab serve": OpenAiLimits().max_body_bytes,
    "vlm-collab gateway": WireLimits().max_body_bytes,
    "vllm serve": OpenAiLimits().max_body_bytes,
}
"""Largest body that a server reads, by the command that starts it."""

_PIECE_BYTES = 2**20


class ProbedRoute(NamedTuple):
    """A route as seen by a client.

    Attributes:
        method: an HTTP method, or `WebSocket`.
        template: its path with the names of its parameters.
        path: its path with a value for each parameter.
    """

    method: str
    template: str
    path: str


def servers(token: str | None, **config: Any) -> dict[str, Starlette]:
    """The applications by the command that starts them, with a token or without.

    The gateway's server cannot be reached.
    """
    ours = service(FakeBackend(), token=token, **config)
    gateway = Gateway(
        GatewayConfig(port=0, api_key=token, deadline_s=0.01, **config), "ws://127.0.0.1:9"
    )
    inside = service(FakeBackend(), token=token, allow_anonymous=True, **config)
    return {
        "vlm-collab serve": ours.app(),
        "vlm-collab gateway": gateway.app(),
        "vllm serve": Starlette(routes=routes_of(inside)),
    }


def probed_routes(routes: Iterable[BaseRoute], below: str = "") -> Iterator[ProbedRoute]:
    """All routes of an application, including mounted ones."""
    for route in routes:
        match route:
            case Mount():
                yield from probed_routes(route.routes, below + route.path)
            case WebSocketRoute():
                yield _probed("WebSocket", below + route.path)
            case Route():
                for method in sorted((route.methods or set()) - {"HEAD"}):
                    yield _probed(method, below + route.path)


async def status_of(app: Starlette, route: ProbedRoute, headers: dict[str, str]) -> int:
    """Send a request; returns the status, 101 for an accepted WebSocket."""
    return (await status_with_body(app, route, headers, 0))[0]


async def status_with_body(
    app: Starlette, route: ProbedRoute, headers: dict[str, str], body_bytes: int
) -> tuple[int, bool]:
    """Send a request with a body of zeros; returns the status, and whether the body was read."""
    given = {"Host": "127.0.0.1", **headers}
    scope: dict[str, Any] = {
        "type": "http",
        "method": route.method,
        "path": route.path,
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }
    piece: Message = {"type": "http.request", "body": bytes(_PIECE_BYTES), "more_body": True}
    last = {"type": "http.request", "body": bytes(body_bytes % _PIECE_BYTES), "more_body": False}
    coming: list[Message] = [last, *[piece] * (body_bytes // _PIECE_BYTES)]
    if route.method == "WebSocket":
        extensions = {"websocket.http.response": {}}
        scope |= {"type": "websocket", "subprotocols": [SUBPROTOCOL], "extensions": extensions}
        coming = [{"type": "websocket.connect"}]
    pieces = len(coming)
    statuses: list[int] = []

    async def receive() -> Message:
        gone = "websocket.disconnect" if scope["type"] == "websocket" else "http.disconnect"
        return coming.pop() if coming else {"type": gone}

    async def send(message: Message) -> None:
        if message["type"].endswith("response.start"):
            statuses.append(message["status"])
        elif message["type"] == "websocket.accept":
            statuses.append(101)

    await app(scope, receive, send)
    return statuses[0], len(coming) < pieces


async def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| server | route | name without a token | page of another origin | no token | body |",
        "|---|---|---|---|---|---|",
    ]
    locked = servers(TOKEN)
    for server, app in servers(None).items():
        methods: dict[tuple[str, ...], list[str]] = {}
        for route in probed_routes(app.routes):
            statuses = (
                _described(await status_of(app, route, FOREIGN_NAME)),
                _described(await status_of(app, route, FOREIGN_PAGE)),
                _described(await status_of(locked[server], route, {})),
                await _body(app, route, MOST_BYTES[server]),
            )
            methods.setdefault((route.template, *statuses), []).append(route.method)
        for (shown, *row), each in methods.items():
            route = f"{', '.join(each)} {shown}"
            lines.append(f"| `{server}` | `{route}` | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


async def page(text: str) -> str:
    """Insert the table into a page."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + await table() + "\n" + END + rest.partition(END)[2]


def _probed(method: str, path: str) -> ProbedRoute:
    shown = path.replace(":path", "")
    parts = [f"any-{one[1:-1]}" if one.startswith("{") else one for one in shown.split("/")]
    return ProbedRoute(method, shown, "/".join(parts))


async def _body(app: Starlette, route: ProbedRoute, most_bytes: int) -> str:
    """The largest body that a route reads."""
    if route.method == "WebSocket":
        return "none"
    status, was_read = await status_with_body(app, route, {}, most_bytes + 1)
    if status == 413:
        return f"at most {most_bytes / 2**20:g} MiB"
    return "any" if was_read else "not read"


def _described(status: int) -> str:
    return f"refused ({status})" if status in (401, 403) else "answered"


if __name__ == "__main__":
    PAGE.write_text(asyncio.run(page(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
