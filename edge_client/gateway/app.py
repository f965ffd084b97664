"""Routes of the gateway."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Unpack

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from edge_client.client import ClientOptions
from edge_client.gateway.admission import Place, Room
from edge_client.gateway.answering import Answerer
from edge_client.gateway.cameras import Cameras
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.logs import REFUSED
from edge_client.gateway.page import Page
from edge_client.gateway.response_store import ResponseStore
from edge_client.gateway.sse_relay import EventTooLongError, whole_events
from edge_client.gateway.streaming import (
    FAILED,
    EventStream,
    Form,
    Gone,
    answer_pieces,
    unless_gone,
)
from edge_client.gateway.upstream import content_of, lost
from edge_client.link.dial import DEFAULT_URL
from vlm_collab import __version__
from vlm_collab.errors import CollabError
from vlm_collab.openai import (
    IGNORED_HEADER,
    ApiError,
    ChatStream,
    Query,
    ResponseBuilder,
    Result,
    TextStream,
    Url,
    api_error,
    chat_is_text,
    check_model,
    completion,
    decode_body,
    ignored_header,
    model_object,
    models_list,
    no_such_route,
    parse_chat,
    parse_responses,
    refuse,
    refuse_pictures_in,
    sse,
    texts_of,
    without_ignored,
    without_tools,
)
from vlm_collab.web.access import Gate
from vlm_collab.web.bodies import body_pieces

log = logging.getLogger(__name__)

HEALTH = ("/healthz", "/readyz")
"""Paths that answer even if there is no place left for anything else."""

_LOOK_S = 5.0
_READY_S = 0.05

_LEFT = 499  # what servers note for a client that left; nobody reads it


class Gateway:
    """OpenAI's APIs for the model of a `vlm-collab/1` server.

    Args:
        config: see `GatewayConfig`.
        url: address of the service.
        options: see `ClientOptions`; `policy` and `audit` hold for all requests.

    Attributes:
        answerer: answers those who name no camera.
        room: who is worked for, and who waits.

    Raises:
        ConfigError: an impossible setting.
    """

    def __init__(
        self, config: GatewayConfig, url: str = DEFAULT_URL, **options: Unpack[ClientOptions]
    ) -> None:
        limits = config.limits
        self.config = config
        self._cameras = Cameras(config, url, **options)
        self.answerer = self._cameras.default
        self._page = Page(self.answerer, limits)
        self._responses = ResponseStore(
            limits.max_responses,
            limits.max_response_bytes,
            max_answers=limits.max_answers,
            max_answer_bytes=limits.max_answer_bytes,
        )
        self._created = int(time.time())
        self.room = Room(limits, config.deadline_s)

    def app(self) -> Starlette:
        """The ASGI application."""
        api = [
            Route("/v1/chat/completions", self._endpoint(self._chat), methods=["POST"]),
            Route("/v1/responses", self._endpoint(self._respond), methods=["POST"]),
            Route("/v1/responses/{id}", self._endpoint(self._forget), methods=["DELETE"]),
            Route("/v1/models", self._endpoint(self._models)),
            Route("/v1/models/{id:path}", self._endpoint(self._model)),
        ]
        routes = [
            *api,
            Mount("/cameras/{camera}", routes=api),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            *self._page.routes(),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, rules=self.config.rules, refused=_log_refusal)],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.close()

    async def close(self) -> None:
        """Close all connections to the server. Questions still open end with an error."""
        await self._cameras.close()

    def _endpoint(
        self, answer: Callable[[Request, Answerer], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route to a camera's answerer, which tells its errors in OpenAI's form."""

        async def endpoint(request: Request) -> Response:
            try:
                camera = self._cameras.get(request.path_params.get("camera"))
                return await answer(request, camera)
            except CollabError as error:
                return _error(api_error(error))
            except (Gone, ClientDisconnect):
                return Response(None, _LEFT)
            # A bug: its trace goes to the log, not to the client.
            except Exception:
                log.exception("%s failed", request.url.path)
                return _error(FAILED)

        return endpoint

    async def _chat(self, request: Request, camera: Answerer) -> Response:
        limits = self.config.limits.wire
        async with self._place(request) as place:
            body = await self._body(request, place)
            texts, ignored = await asyncio.to_thread(without_ignored, body)
            if await asyncio.to_thread(chat_is_text, texts):
                return await self._forward(request, camera, texts, ignored, place)
            query = await asyncio.to_thread(parse_chat, body, limits)
            id, created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
            model = await self._model_name(request, camera, query)
            if query.stream:
                form = ChatStream(
                    id=id, created=created, model=model, include_usage=query.include_usage
                )
                return await self._stream(request, camera, query, form, lambda result: None, place)
            result = await unless_gone(request.receive, camera.answer(query, None))
            whole = completion(result, id=id, created=created, model=model)
            return _json(whole, headers=ignored_header(query.ignored))

    async def _respond(self, request: Request, camera: Answerer) -> Response:
        limits = self.config.limits.wire
        async with self._place(request) as place:
            body = await self._body(request, place)
            asked = await asyncio.to_thread(parse_responses, body, limits)
            asked = asked.resolve_references(lambda id: self._responses.answer(camera.camera, id))
            if asked.region_tool or asked.outputs:
                raise refuse(
                    "tools" if asked.region_tool else "input",
                    "this gateway answers region requests by itself: send the original picture, "
                    "and no tools",
                    "unsupported_parameter",
                )
            before = self._responses.get(camera.camera, asked.previous_response_id)
            query = asked.query(before)
            id, created = f"resp_{secrets.token_hex(24)}", int(time.time())
            model = await self._model_name(request, camera, query)
            form = ResponseBuilder(asked, id=id, created=created, model=model)
            fetched: dict[Url, bytes] = {}

            def keep(result: Result) -> None:
                if asked.store:
                    # An address may show something else by the time it is gone on from.
                    whole = (
                        asked.conversation_after(before)
                        .with_fetched(fetched)
                        .with_answer(result.text)
                    )
                    self._responses.keep(camera.camera, id, whole, result.text)

            if query.stream:
                return await self._stream(request, camera, query, form, keep, place, fetched)
            answering = camera.answer(query, None, fetched)
            result = await unless_gone(request.receive, answering)
            keep(result)
            return _json(form.whole(result), headers=ignored_header(query.ignored))

    async def _forget(self, request: Request, camera: Answerer) -> Response:
        id = str(request.path_params["id"])
        self._responses.forget(camera.camera, id)
        return _json({"id": id, "object": "response", "deleted": True})

    async def _stream(
        self,
        request: Request,
        camera: Answerer,
        query: Query,
        form: Form,
        finished: Callable[[Result], None],
        place: Place,
        fetched: dict[Url, bytes] | None = None,
    ) -> Response:
        pieces = answer_pieces(
            lambda on_text: camera.answer(query, on_text, fetched),
            form,
            TextStream(query.options.stop),
            whole=query.options.tokens,
            finished=finished,
        )
        events = _events(await self._first(request, pieces), pieces, place)
        events.headers.update(ignored_header(query.ignored))
        return events

    async def _first(self, request: Request, pieces: AsyncGenerator[bytes, None]) -> bytes:
        """What a stream begins with; what goes wrong before is told by a status."""
        try:
            return await unless_gone(request.receive, _next(pieces))
        except BaseException:
            await pieces.aclose()
            raise

    async def _forward(
        self,
        request: Request,
        camera: Answerer,
        body: Mapping[str, Any],
        ignored: tuple[str, ...],
        place: Place,
    ) -> Response:
        """Hand a request about text alone to the server's own API, as it is.

        Args:
            ignored: what of it is not handed on.
        """
        await asyncio.to_thread(refuse_pictures_in, body)
        camera.check_size(texts_of(body))
        camera.check_time()
        welcome = await unless_gone(request.receive, camera.welcome())
        if not body.get("model") or body.get("model") in self.config.aliases:
            body = {**body, "model": welcome.model}
        async with AsyncExitStack() as opened:

            async def forwarded(body: Mapping[str, Any]) -> httpx.Response:
                forwarding = opened.enter_async_context(camera.texts.forward(body))
                return await unless_gone(request.receive, forwarding)

            response = await forwarded(body)
            # vLLM refuses tools unless it was started to read calls. An offer can be left.
            if response.status_code == 400 and (untold := without_tools(body)) is not None:
                response = await forwarded(untold)
                ignored = (*ignored, "tools") if body.get("tools") else ignored
            theirs = response.headers.get(IGNORED_HEADER)
            listed = ignored_header([*ignored, *([theirs] if theirs else [])])
            if body.get("stream") is True and response.status_code == 200:
                pieces = _passed_on(response)
                first = await self._first(request, pieces)
                events = _events(first, pieces, place, opened.pop_all())
                events.headers.update(listed)
                return events
            content = await unless_gone(request.receive, content_of(response))
            kept = {name: response.headers[name] for name in _KEPT if name in response.headers}
            return Response(content, response.status_code, kept | listed)

    async def _model_name(self, request: Request, camera: Answerer, query: Query) -> str:
        """The name that the answer says it is from: as the client has it, if it has any."""
        if query.model:
            return query.model
        return (await unless_gone(request.receive, camera.welcome())).model

    async def _models(self, request: Request, camera: Answerer) -> Response:
        within_s = min(_LOOK_S, self.config.deadline_s)
        welcome = await camera.welcome(within_s)
        context = await camera.texts.context_tokens(welcome.model, within_s)
        return _json(models_list(camera.names(welcome), self._created, context))

    async def _model(self, request: Request, camera: Answerer) -> Response:
        name = str(request.path_params["id"])
        if not name:
            return await self._models(request, camera)
        within_s = min(_LOOK_S, self.config.deadline_s)
        welcome = await camera.welcome(within_s)
        check_model(name, camera.names(welcome))
        context = await camera.texts.context_tokens(welcome.model, within_s)
        return _json(model_object(name, self._created, context))

    async def _health(self, _: Request) -> Response:
        """The process is alive."""
        return PlainTextResponse("ok")

    async def _ready(self, _: Request) -> Response:
        """The server is there."""
        try:
            model: str | None = (await self.answerer.welcome(_READY_S)).model
        except CollabError:
            model = None
        body = {"ready": model is not None, "model": model, "version": __version__}
        return _json(body, 200 if model is not None else 503)

    def _place(self, request: Request) -> AbstractAsyncContextManager[Place]:
        """A place for a request, once there is one. Its body is not read before."""
        said = request.headers.get("content-length", "")
        nbytes = int(said) if said.isascii() and said.isdecimal() else 0
        return self.room.place(min(nbytes, self.config.limits.wire.max_body_bytes))

    async def _body(self, request: Request, place: Place) -> dict[str, Any]:
        limits = self.config.limits
        most, data, size = limits.wire.max_body_bytes, bytearray(), 0
        try:
            async with place.reading(limits.body_timeout_s):
                async for piece in body_pieces(request):
                    place.came()
                    size += len(piece)
                    if size > 4 * most:
                        break
                    # A client that still sends does not read; within reason it is let finish.
                    if size > most:
                        continue
                    place.hold(size)
                    data += piece
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time") from None
        if size > most:
            raise refuse(
                None,
                f"the request has more than {most} bytes",
                "request_too_large",
                status=413,
            )
        return await asyncio.to_thread(decode_body, bytes(data), most)


_KEPT = ("content-type", "retry-after")


def _events(
    first: bytes,
    pieces: AsyncGenerator[bytes, None],
    place: Place,
    opened: AsyncExitStack | None = None,
) -> EventStream:
    """A stream, which keeps its request's place until its end."""
    closing = opened or AsyncExitStack()
    place.kept = True
    closing.callback(place.leave)
    return EventStream(first, pieces, closing)


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces, b"")


async def _passed_on(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """A stream as it is, event by event, with an error of our own where it breaks off."""
    try:
        async for events in whole_events(response.aiter_bytes()):
            yield events
    except httpx.HTTPError as error:
        yield sse(lost(error).body())
    except EventTooLongError:
        text = "the server behind this gateway sends an event that has no end"
        yield sse(ApiError(502, text, "server_error", None, "upstream_protocol").body())


def _log_refusal(client: HTTPConnection, error: ApiError) -> None:
    log.info(REFUSED, client.scope["type"], error)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(error.encoded(), error.status, error.headers(), media_type="application/json")


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    # A camera's base URL goes on before the version.
    camera = "/".join(path.split("/")[:3]) if path.startswith("/cameras/") else ""
    told = no_such_route(request.method, path, error.status_code, base=camera)
    return Response(told.encoded(), told.status, error.headers, media_type="application/json")
