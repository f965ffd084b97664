"""Forwarding chat requests without pictures to the server's own OpenAI API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.admission import AdmissionSlot
from edge_client.gateway.answerer import Answerer
from edge_client.gateway.sse_relay import EventTooLongError, whole_events
from edge_client.gateway.streaming import stream_response
from edge_client.gateway.upstream import content_of, lost
from vlm_collab.openai import (
    IGNORED_HEADER,
    ApiError,
    ignored_header,
    refuse_pictures_in,
    sse,
    texts_of,
    without_tools,
)
from vlm_collab.web.streams import while_connected

_KEPT_HEADERS = ("content-type", "retry-after")


async def forward_chat(
    request: Request,
    camera: Answerer,
    body: Mapping[str, Any],
    ignored: tuple[str, ...],
    slot: AdmissionSlot,
    aliases: Sequence[str],
) -> Response:
    """Forward a Chat Completions request unchanged, except for the model's name.

    Args:
        request: the client's request.
        camera: its rules apply, and its server answers.
        body: the request's body, without the ignored parameters.
        ignored: names of the ignored parameters.
        slot: the request's slot; a streamed response keeps it.
        aliases: names that stand for the server's model.

    Raises:
        CollabError: the gateway refuses the request, or the server cannot be reached.
        ClientGoneError: the client disconnected.
    """
    await asyncio.to_thread(refuse_pictures_in, body)
    camera.check_size(texts_of(body))
    camera.check_time()
    welcome = await while_connected(request.receive, camera.welcome())
    if not body.get("model") or body.get("model") in aliases:
        body = {**body, "model": welcome.model}
    async with AsyncExitStack() as opened:

        async def forwarded(body: Mapping[str, Any]) -> httpx.Response:
            forwarding = opened.enter_async_context(camera.texts.forward(body))
            return await while_connected(request.receive, forwarding)

        response = await forwarded(body)
        # vLLM refuses tools unless it was started with a parser for calls. Tools that the model
        # need not call can be left out.
        if response.status_code == 400 and (toolless := without_tools(body)) is not None:
            response = await forwarded(toolless)
            ignored = (*ignored, "tools") if body.get("tools") else ignored
        upstream_ignored = response.headers.get(IGNORED_HEADER)
        listed = ignored_header([*ignored, *([upstream_ignored] if upstream_ignored else [])])
        if body.get("stream") is True and response.status_code == 200:
            return await stream_response(request, _relayed(response), slot, listed, opened)
        content = await while_connected(request.receive, content_of(response))
        headers = response.headers
        kept = {name: headers[name] for name in _KEPT_HEADERS if name in headers}
        return Response(content, response.status_code, kept | listed)


async def _relayed(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Relay a stream unchanged, event by event; if it breaks off, an error event follows."""
    try:
        async for events in whole_events(response.aiter_bytes()):
            yield events
    except httpx.HTTPError as error:
        yield sse(lost(error).body())
    except EventTooLongError:
        text = "the server behind this gateway sent an event that is too long"
        yield sse(ApiError(502, text, "server_error", None, "upstream_protocol").body())
