"""The gateway's ASGI application and its routes."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from edge_client.client import ClientOptions
from edge_client.gateway.admission import Admission
from edge_client.gateway.answerer import Answerer
from edge_client.gateway.cameras import Cameras
from edge_client.gateway.chat import ChatEndpoint
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.http import json_response
from edge_client.gateway.logs import REFUSED
from edge_client.gateway.page import Page
from edge_client.gateway.responses import ResponsesEndpoint
from edge_client.gateway.streaming import FAILED
from edge_client.link.dial import DEFAULT_URL
from vlm_collab.errors import CollabError
from vlm_collab.openai import (
    ApiError,
    api_error,
    check_model,
    model_object,
    models_list,
)
from vlm_collab.web.gate import Gate
from vlm_collab.web.health import ALIVE, READY, Readiness, health_routes
from vlm_collab.web.refusals import RefusalFormat, response_of
from vlm_collab.web.streams import ClientGoneError
from vlm_collab.web.unknown_routes import unknown_routes

log = logging.getLogger(__name__)

HEALTH = (ALIVE, READY)
"""Paths that are answered even if no connection slot is free."""

_MODELS_WAIT_S = 5.0
_READY_WAIT_S = 0.05

_CLIENT_GONE = 499  # the usual status for a client that disconnected; no client reads it


class Gateway:
    """OpenAI's APIs for the model of a `vlm-collab/1` server.

    Args:
        config: see `GatewayConfig`.
        url: address of the service.
        options: see `ClientOptions`; `policy` and `audit` apply to all requests.

    Attributes:
        answerer: answers requests that name no camera.
        admission: admits requests.

    Raises:
        ConfigError: a setting is invalid.
    """

    def __init__(
        self, config: GatewayConfig, url: str = DEFAULT_URL, **options: Unpack[ClientOptions]
    ) -> None:
        self.config = config
        self._cameras = Cameras(config, url, **options)
        self.answerer = self._cameras.default
        self.admission = Admission(config.limits, config.deadline_s)
        self._chat = ChatEndpoint(config, self.admission)
        self._responses = ResponsesEndpoint(config, self.admission)
        self._page = Page(self.answerer, config.limits)
        self._created = int(time.time())

    def app(self) -> Starlette:
        """Make the ASGI application."""
        chat, responses = self._chat, self._responses
        api = [
            Route("/v1/chat/completions", self._endpoint(chat.answer), methods=["POST"]),
            Route("/v1/responses", self._endpoint(responses.answer), methods=["POST"]),
            Route("/v1/responses/{id}", self._endpoint(responses.delete), methods=["DELETE"]),
            Route("/v1/models", self._endpoint(self._models)),
            Route("/v1/models/{id:path}", self._endpoint(self._model)),
        ]
        routes = [
            *api,
            Mount("/cameras/{camera}", routes=api),
            *health_routes(self._readiness),
            *self._page.routes(),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, rules=self.config.rules, refused=_log_refusal)],
            exception_handlers={HTTPException: unknown_routes(_base_of)},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.close()

    async def close(self) -> None:
        """Close all connections to the server. Unanswered questions end with an error."""
        await self._cameras.close()

    def _endpoint(
        self, answer: Callable[[Request, Answerer], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Make an endpoint that finds the camera and reports errors in OpenAI's format."""

        async def endpoint(request: Request) -> Response:
            try:
                camera = self._cameras.get(request.path_params.get("camera"))
                return await answer(request, camera)
            except CollabError as error:
                return response_of(api_error(error), RefusalFormat.JSON)
            except (ClientGoneError, ClientDisconnect):
                return Response(None, _CLIENT_GONE)
            # A bug: its traceback goes to the log, not to the client.
            except Exception:
                log.exception("%s failed", request.url.path)
                return response_of(FAILED, RefusalFormat.JSON)

        return endpoint

    async def _models(self, request: Request, camera: Answerer) -> Response:
        wait_s = min(_MODELS_WAIT_S, self.config.deadline_s)
        welcome = await camera.welcome(wait_s)
        context = await camera.texts.context_tokens(welcome.model, wait_s)
        return json_response(models_list(camera.names(welcome), self._created, context))

    async def _model(self, request: Request, camera: Answerer) -> Response:
        name = str(request.path_params["id"])
        if not name:
            return await self._models(request, camera)
        wait_s = min(_MODELS_WAIT_S, self.config.deadline_s)
        welcome = await camera.welcome(wait_s)
        check_model(name, camera.names(welcome))
        context = await camera.texts.context_tokens(welcome.model, wait_s)
        return json_response(model_object(name, self._created, context))

    async def _readiness(self) -> Readiness:
        """Report whether the server can be reached."""
        try:
            welcome = await self.answerer.welcome(_READY_WAIT_S)
        except CollabError:
            return Readiness(False, None)
        return Readiness(True, welcome.model)


def _log_refusal(client: HTTPConnection, error: ApiError) -> None:
    log.info(REFUSED, client.scope["type"], error)


def _base_of(path: str) -> str:
    """The prefix of `/v1`, which is not empty in the API of a camera."""
    return "/".join(path.split("/")[:3]) if path.startswith("/cameras/") else ""
