"""Client of the server's own OpenAI API, for requests without pictures."""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec
from httpx_sse import EventSource

from edge_client.link.dial import ENDPOINT, Server
from vlm_collab.errors import ConfigError
from vlm_collab.openai import ApiError, Query, Report, Result, refuse
from vlm_collab.protocol.messages import Finish, Stage, Token, micro

_CHAT, _MODELS = "/v1/chat/completions", "/v1/models"
_NATS_PER_BIT = math.log(2.0)

TextSink = Callable[[Stage, str], None]


class TextUpstream:
    """Forwards requests to `/v1/chat/completions` on the server's host and port.

    Args:
        server: address of its WebSocket, token and certificate authorities.
        timeout_s: longest time without a byte, in seconds.

    Raises:
        ConfigError: the CA file cannot be used.
    """

    def __init__(self, server: Server, *, timeout_s: float) -> None:
        headers = {} if server.token is None else {"Authorization": f"Bearer {server.token}"}
        self._http = httpx.AsyncClient(
            headers=headers,
            verify=_tls_context(server),
            proxy=server.proxy,
            trust_env=False,
            timeout=httpx.Timeout(timeout_s, connect=server.connect_timeout_s),
        )
        self._url = _http_url(server.url, _CHAT)
        self._models_url = _http_url(server.url, _MODELS)

    async def close(self) -> None:
        """Close the HTTP client."""
        await self._http.aclose()

    @asynccontextmanager
    async def forward(self, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """Send a request unchanged. The response's body is not read yet.

        Yields:
            A response that is an answer, or an error in OpenAI's format.

        Raises:
            ApiError: the server has no such API, or cannot be reached.
        """
        request = self._http.build_request(
            "POST",
            self._url,
            content=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
        )
        try:
            response = await self._http.send(request, stream=True)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise lost(error) from None
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ApiError(
                503,
                f"the server cannot be reached: {why}",
                "server_error",
                None,
                "no_server",
                retry_after_s=5.0,
            ) from None
        try:
            if response.status_code != 200:
                _check_refusal(response.status_code, await content_of(response))
            yield response
        finally:
            await response.aclose()

    async def context_tokens(self, model: str, within_s: float) -> int | None:
        """The model's context length in tokens; None if the server does not report it."""
        try:
            response = await self._http.get(self._models_url, timeout=within_s)
            listed = msgspec.json.decode(response.content)["data"]
            (length,) = {one["max_model_len"] for one in listed if one["id"] == model}
        except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        except (KeyError, TypeError, ValueError):  # a list in another format
            return None
        return length if isinstance(length, int) and length > 0 else None

    async def ask(self, query: Query, model: str, on_text: TextSink | None) -> Result:
        """Ask a question without pictures.

        Raises:
            ApiError: the server's refusal, or see `forward`.
        """
        body = _chat_body(query, model, stream=on_text is not None)
        async with self.forward(body) as response:
            if response.status_code != 200:
                raise _refusal(response.status_code, response.content, response.headers)
            try:
                if on_text is None:
                    return _result(msgspec.json.decode(await content_of(response)), model)
                return await _stream(response, model, on_text)
            except (msgspec.DecodeError, KeyError, IndexError, TypeError, AttributeError):
                raise _protocol_error() from None
            except httpx.HTTPError as error:
                raise lost(error) from None


async def content_of(response: httpx.Response) -> bytes:
    """Read a response's body.

    Raises:
        ApiError: the connection broke.
    """
    try:
        return await response.aread()
    except httpx.HTTPError as error:
        raise lost(error) from None


def lost(error: httpx.HTTPError) -> ApiError:
    """The error for a connection that broke, or timed out, after the request was sent."""
    if isinstance(error, httpx.TimeoutException):
        return ApiError(504, "the server did not answer in time", "timeout_error")
    why = str(error) or type(error).__name__
    return ApiError(502, f"the connection to the server was lost: {why}", "server_error")


def _tls_context(server: Server) -> ssl.SSLContext | bool:
    """The TLS context; False without TLS, so that no CA file is read."""
    if not server.url.startswith("wss:"):
        return False
    try:
        return ssl.create_default_context(cafile=server.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"CA file {server.ca_file}: {error.strerror or error}") from error


def _http_url(url: str, route: str) -> str:
    parts = urlsplit(url)
    scheme = "https" if parts.scheme == "wss" else "http"
    path = parts.path.removesuffix(ENDPOINT) if parts.path.endswith(ENDPOINT) else ""
    return urlunsplit((scheme, parts.netloc, path + route, "", ""))


def _check_refusal(status: int, content: bytes) -> None:
    """Check that a refusal is one in OpenAI's format and concerns the client.

    Raises:
        ApiError: the server has no such API, or refuses the gateway's token.
    """
    if status in (401, 403):
        raise ApiError(
            502,
            f"the server behind this gateway refuses access (HTTP {status}); check --token-file",
            "server_error",
            None,
            "upstream_authentication",
        )
    if _error_in(content) is not None:
        return
    if status in (404, 405, 426, 501):
        raise refuse(
            "messages",
            "the server behind this gateway answers only questions about pictures; add a picture",
            "picture_needed",
        )
    raise _protocol_error(f" (HTTP {status})")


def _error_in(content: bytes) -> Mapping[str, Any] | None:
    try:
        error = msgspec.json.decode(content)["error"]
    except (msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError):
        return None
    return error if isinstance(error, dict) else None


def _refusal(
    status: int, content: bytes, headers: Mapping[str, str] = MappingProxyType({})
) -> ApiError:
    error = _error_in(content) or {}
    retry_after = headers.get("retry-after", "")
    return ApiError(
        status,
        str(error.get("message", "the server refused the question")),
        str(error.get("type", "server_error")),
        None,
        None if error.get("code") is None else str(error["code"]),
        retry_after_s=float(retry_after)
        if retry_after.isascii() and retry_after.isdecimal()
        else None,
    )


def _protocol_error(more: str = "") -> ApiError:
    text = f"the server behind this gateway does not answer in OpenAI's format{more}"
    return ApiError(502, text, "server_error", None, "upstream_protocol")


def _chat_body(query: Query, model: str, *, stream: bool) -> dict[str, Any]:
    messages = []
    for question, answer in query.history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": query.question})
    options = query.options
    parameters = {
        "max_tokens": options.max_new_tokens,
        "stop": list(options.stop) or None,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "logprobs": options.tokens or None,
        "stream": stream or None,
        "stream_options": {"include_usage": True} if stream else None,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"model": model, "messages": messages, **given}


def _result(body: Mapping[str, Any], model: str) -> Result:
    choice = body["choices"][0]
    text = choice["message"]["content"] or ""
    return _make_result(text, choice["finish_reason"], body["usage"], _tokens(choice), model)


def _tokens(choice: Mapping[str, Any]) -> list[Token]:
    """The tokens in a choice's logprobs, which are in nats."""
    listed = (choice.get("logprobs") or {}).get("content") or []
    return [Token(one["token"], micro(max(0.0, -one["logprob"] / _NATS_PER_BIT))) for one in listed]


def _make_result(
    text: str, reason: str | None, usage: Mapping[str, Any], tokens: list[Token], model: str
) -> Result:
    return Result(
        text=text,
        report=Report(model=model),
        finish=Finish.LENGTH if reason == "length" else Finish.END,
        tokens=tuple(tokens),
        prompt_tokens=int(usage["prompt_tokens"]),
        completion_tokens=int(usage["completion_tokens"]),
    )


async def _stream(response: httpx.Response, model: str, on_text: TextSink) -> Result:
    text, reason = "", None
    tokens: list[Token] = []
    usage: Mapping[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
    # httpx-sse requires this type, but some servers send another one.
    response.headers["content-type"] = "text/event-stream"
    async for event in EventSource(response).aiter_sse():
        if not event.data or event.data == "[DONE]":
            continue
        chunk = msgspec.json.decode(event.data)
        if "error" in chunk:
            raise _refusal(502, event.data.encode())
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            reason = choice.get("finish_reason") or reason
            tokens += _tokens(choice)
            piece = choice["delta"].get("content")
            if piece:
                text += piece
                # The server never replaces streamed text, so it counts as a second-stage text.
                on_text(Stage.SECOND, text)
    if reason is None:
        raise _protocol_error()
    return _make_result(text, reason, usage, tokens, model)
