"""Reading JSON requests within the gateway's bounds, and writing JSON responses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.admission import Admission, AdmissionSlot
from edge_client.gateway.config import GatewayLimits
from vlm_collab.openai import ApiError, decode_body, refuse
from vlm_collab.web.bodies import BodyTooLargeError, read_body


def admitted(
    request: Request, admission: Admission, limits: GatewayLimits
) -> AbstractAsyncContextManager[AdmissionSlot]:
    """Wait for a request's slot; the body is read after that."""
    announced = request.headers.get("content-length", "")
    nbytes = int(announced) if announced.isascii() and announced.isdecimal() else 0
    return admission.slot(min(nbytes, limits.wire.max_body_bytes))


async def read_json(request: Request, slot: AdmissionSlot, limits: GatewayLimits) -> dict[str, Any]:
    """Read and decode a request's body.

    Raises:
        ApiError: too slow (408), too large (413), no memory (429), or not a JSON object (400).
        ClientDisconnect: the client left.
    """
    most = limits.wire.max_body_bytes

    def received(size: int) -> None:
        slot.received()
        if size <= most:
            slot.reserve(size)

    try:
        async with slot.reading(limits.body_timeout_s):
            data = await read_body(request, most, received, discard_bytes=4 * most)
    except TimeoutError:
        raise ApiError(408, "the request did not arrive in time") from None
    except BodyTooLargeError:
        text = f"the request has more than {most} bytes"
        raise refuse(None, text, "request_too_large", status=413) from None
    return await asyncio.to_thread(decode_body, data, most)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response with a JSON body."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
