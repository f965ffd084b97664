"""Errors in OpenAI's format, and the translation of this project's errors to them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from vlm_collab.errors import (
    AuthenticationError,
    BusyError,
    CollabError,
    ConfigError,
    DeadlineError,
    ErrorCode,
    ImageError,
    ImageTooLargeError,
    LinkError,
    PrivacyError,
    ProtocolError,
    QuestionError,
    ServerError,
)

INVALID = "invalid_request_error"
"""`type` of errors that the client can correct."""

_BUSY_S = 1.0


class ApiError(CollabError):
    """An error in OpenAI's format.

    Args:
        status: HTTP status.
        message: one line for a person.
        type: OpenAI's class of errors, such as `invalid_request_error`.
        param: the parameter at fault, as a path such as `messages[0].content[1].image_url.url`.
        code: name of the reason, OpenAI's or this project's.
        retry_after_s: when to ask again, in seconds; None if that cannot help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        *,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON object that goes to the client."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def encoded(self) -> bytes:
        """`body` as JSON."""
        return msgspec.json.encode(self.body())

    def headers(self) -> dict[str, str]:
        """HTTP headers of the error response."""
        if self.retry_after_s is None:
            return {}
        # Whole seconds, at least one: an immediate retry would fail again. At most a minute: the
        # SDK ignores longer waits and makes its own short pauses.
        return {"Retry-After": str(min(max(1, math.ceil(self.retry_after_s)), 60))}


def refuse(
    param: str | None, message: str, code: str = "invalid_value", *, status: int = 400
) -> ApiError:
    """Make an `ApiError` that the client can correct."""
    return ApiError(status, message, INVALID, param, code)


_ROUTES = ("/chat/completions", "/responses", "/models")
_MOST_PATH_CHARS = 200


def no_such_route(method: str, path: str, status: int = 404, *, base: str = "") -> ApiError:
    """The error for a request to an unknown route.

    Args:
        method: HTTP method of the request.
        path: path of the request.
        status: 405 if the route exists, but not with this method.
        base: prefix of `/v1` at this address, such as `/cameras/door`.
    """
    shown = "".join(char if char.isprintable() else "?" for char in path[:_MOST_PATH_CHARS])
    text = f"there is no {method} {shown} here"
    trimmed = path.rstrip("/")
    meant = next((route for route in _ROUTES if trimmed.endswith(route)), None)
    if meant is None and trimmed.endswith("/completions"):
        meant = _ROUTES[0]
    if status == 405:
        text = f"{text}: method not allowed"
    elif meant is None:
        text = f"{text}; OpenAI's API is at {base}/v1"
    else:
        text = f"{text}; did you mean {base}/v1{meant}? The base URL ends in {base}/v1"
    return ApiError(status, text, INVALID, None, "unknown_url")


def api_error(error: CollabError, *, param: str | None = None) -> ApiError:
    """Translate an error of this project to OpenAI's format.

    Args:
        error: why a question was not answered.
        param: the parameter that caused it, if known.
    """
    text = str(error)
    match error:
        case ApiError():
            return error
        case ImageTooLargeError():
            return refuse(param, text, "image_too_large", status=413)
        case ImageError():
            return refuse(param, text, "invalid_image")
        case QuestionError():
            return refuse(param, text, "invalid_question")
        case ConfigError():
            return refuse(param, text, "invalid_option")
        case PrivacyError():
            return ApiError(403, text, "permission_error", param, "privacy_policy")
        case DeadlineError():
            return ApiError(504, text, "timeout_error", None, "deadline")
        case AuthenticationError():
            # The client's own key is right; the gateway's token for the server is not.
            text = f"the server behind this gateway refuses the gateway: {text}"
            return ApiError(502, text, "server_error", None, "upstream_authentication")
        case LinkError():
            return ApiError(503, text, "server_error", None, "no_server", retry_after_s=5.0)
        case BusyError():
            wait_s = _BUSY_S if error.retry_after_s is None else error.retry_after_s
            return ApiError(429, text, "rate_limit_error", None, "busy", retry_after_s=wait_s)
        case ServerError():
            return _of_server(error, param)
        case ProtocolError() if error.code is ErrorCode.TOO_LARGE:
            return refuse(param, text, "too_large", status=413)
        case ProtocolError():
            return ApiError(502, text, "server_error", None, "upstream_protocol")
    return ApiError(500, text, "server_error", None, "internal")


def _of_server(error: ServerError, param: str | None) -> ApiError:
    text = str(error)
    match error.code:
        case ErrorCode.BAD_IMAGE:
            return refuse(param, text, "invalid_image")
        case ErrorCode.TOO_LARGE:
            return refuse(param, text, "too_large", status=413)
        case ErrorCode.BAD_QUESTION:
            return refuse(param, text, "invalid_question")
        case ErrorCode.BAD_OPTION:
            return refuse(None, text, "invalid_option")
        case ErrorCode.SHUTTING_DOWN:
            return ApiError(503, text, "server_error", None, "shutting_down", retry_after_s=5.0)
        case ErrorCode.DEADLINE:
            return ApiError(504, text, "timeout_error", None, "deadline")
        case ErrorCode.INTERNAL:
            return ApiError(500, text, "server_error", None, "internal")
    return ApiError(502, text, "server_error", None, error.code.name.lower())
