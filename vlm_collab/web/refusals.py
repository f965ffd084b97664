"""Refusals as HTTP responses: the format that a route uses, and the response."""

from __future__ import annotations

import enum

from starlette.responses import PlainTextResponse, Response

from vlm_collab.openai import ApiError
from vlm_collab.web.access import is_open


class RefusalFormat(enum.Enum):
    """How a refusal is written."""

    JSON = "JSON"
    """An error object as in OpenAI's API."""
    TEXT = "text"
    """A line of text, for pages, probes and WebSockets."""


def format_of(path: str) -> RefusalFormat:
    """The format of a route's refusals."""
    return (
        RefusalFormat.TEXT
        if is_open(path) or path in ("/page/access", "/metrics")
        else RefusalFormat.JSON
    )


def response_of(error: ApiError, form: RefusalFormat) -> Response:
    """Convert an error to a response."""
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if form is RefusalFormat.TEXT:
        return PlainTextResponse(str(error), error.status, headers)
    return Response(error.encoded(), error.status, headers, media_type="application/json")
