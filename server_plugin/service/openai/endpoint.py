"""`/v1/chat/completions`, `/v1/responses` and `/v1/models` on the service itself.

A client uploads whole pictures, and both stages run here. Or, in the Responses API, it offers the
tool `request_region`: then it is the edge, its pictures are views, and a question that the model
is unsure of waits in `Memory` until the client sends the crop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server_plugin.service.openai.chat import Chat
from server_plugin.service.openai.intake import Asker, Client
from server_plugin.service.openai.response_store import Memory
from server_plugin.service.openai.responses import Responses, unknown_response
from server_plugin.service.openai.transport import (
    Bodies,
    ClientGoneError,
    Sender,
    headers_of,
    while_connected,
)
from vlm_collab.openai import ApiError, check_model, model_object, models_list

if TYPE_CHECKING:
    from server_plugin.service.asgi import Service

log = logging.getLogger(__name__)


class OpenAiEndpoint:
    """The endpoint's routes, and what its requests share.

    Args:
        service: whose engine answers.

    Attributes:
        bodies: requests in memory.
        memory: responses that can be gone on from.
        answers: what responses said, which is referred to for longer.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        limits = service.config.openai
        self._asker = Asker(service)
        self.bodies = Bodies(
            limits, service.config.limits.question_timeout_s, service.queue.retry_after_s
        )
        self.memory = Memory(limits)
        self.answers = Memory(
            replace(limits, keep_s=limits.keep_answers_s, max_kept_bytes=limits.max_answers_bytes)
        )
        self._created = int(time.time())
        for name, text, value in (
            ("kept_responses", "Responses kept for later requests.", lambda: self.memory.count),
            ("kept_bytes", "Memory that they occupy, in bytes.", lambda: self.memory.nbytes),
            ("body_bytes", "HTTP requests in memory, in bytes.", lambda: self.bodies.nbytes),
        ):
            service.metrics.gauge(name, text, value)

    def routes(self) -> list[Route]:
        """The routes."""
        chat = Chat(self._asker)
        responses = Responses(self._asker, self.memory, self.answers)
        post = ["POST"]
        return [
            Route("/v1/models", self._at_once(self._models)),
            Route("/v1/models/{name:path}", self._at_once(self._model)),
            Route(
                "/v1/chat/completions",
                _Question(self._service, self, "chat_completions", chat.answer),
                methods=post,
            ),
            Route(
                "/v1/responses",
                _Question(self._service, self, "responses", responses.answer),
                methods=post,
            ),
            Route("/v1/responses/{id}", self._at_once(self._forget), methods=["DELETE"]),
        ]

    def hurry(self, patience_s: float) -> None:
        """Wait so long at most for clients that were asked for a region."""
        self._asker.hurry(patience_s)

    def shut_down(self) -> None:
        """End what is in flight, with first answers where there are some."""
        self._asker.shut_down()

    def close(self) -> None:
        """Forget what is kept."""
        self.memory.clear()
        self.answers.clear()
        self._asker.close()

    def _at_once(
        self, answer: Callable[[Request], dict[str, Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that answers at once."""

        async def handle(request: Request) -> Response:
            try:
                body = msgspec.json.encode(answer(request))
            except ApiError as error:
                return Response(
                    error.encoded(), error.status, headers_of(error), "application/json"
                )
            return Response(body, media_type="application/json")

        return handle

    def _models(self, _: Request) -> dict[str, Any]:
        context = self._service.engine.backend.info.context_tokens
        listed = models_list([self._asker.model], self._created, context)
        return {**listed, "data": [self._described(each) for each in listed["data"]]}

    def _model(self, request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        if not name:
            return self._models(request)
        check_model(name, [self._asker.model])
        context = self._service.engine.backend.info.context_tokens
        return self._described(model_object(self._asker.model, self._created, context))

    def _described(self, model: dict[str, Any]) -> dict[str, Any]:
        """With what a client that makes its own views needs to know."""
        info = self._service.engine.backend.info
        width, height = info.view
        view = {"view_width": width, "view_height": height, "fit": info.fit.value}
        return {**model, "vlm_collab": view}

    def _forget(self, request: Request) -> dict[str, Any]:
        id = request.path_params["id"]
        tenant = Client.of(request).tenant
        known = [each.forget(tenant, id) for each in (self.memory, self.answers)]
        if not any(known):
            raise unknown_response(id, "response_id")
        return {"id": id, "object": "response", "deleted": True}


class _Question:
    """One route that takes a question: how much is read, what goes wrong."""

    def __init__(
        self,
        service: Service,
        endpoint: OpenAiEndpoint,
        kind: str,
        answer: Callable[[Client, bytes, Sender], Awaitable[None]],
    ) -> None:
        self._service, self._endpoint, self._kind, self._answer = service, endpoint, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sender = Sender(send, self._service.config.limits.write_timeout_s)
        counted = self._service.metrics.bytes
        try:
            async with self._endpoint.bodies.read(request) as body:
                counted.labels(self._kind, "up").inc(len(body))
                work = self._told(self._answer(Client.of(request), body, sender), sender)
                await while_connected(receive, work)
        except ApiError as error:
            await self._tell(error, sender)
        except ClientGoneError:
            log.info("client left", extra={"request": self._kind})
        finally:
            counted.labels(self._kind, "down").inc(sender.sent)

    async def _told(self, answering: Awaitable[None], sender: Sender) -> None:
        """Whatever goes wrong is told, unless a stream has begun, which is cut then."""
        try:
            await answering
        except (ApiError, ClientGoneError):
            raise
        except Exception:
            log.exception("request failed", extra={"request": self._kind})
            if sender.started:
                raise
            raise ApiError(500, "the server failed", "server_error", None, "internal") from None

    async def _tell(self, error: ApiError, sender: Sender) -> None:
        name = error.code or str(error.status)
        log.info("request refused", extra={"request": self._kind, "code": name})
        try:
            await sender.error(error)
        except ClientGoneError:
            log.info("client left", extra={"request": self._kind})
