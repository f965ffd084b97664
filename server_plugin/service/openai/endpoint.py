"""`/v1/chat/completions`, `/v1/responses` and `/v1/models` on the service itself.

A client uploads whole pictures, and both stages run here. In the Responses API a client can also
act as the edge: it sends views and offers the tool `request_region`. When the model is unsure, the
question waits in `ResponseStore` until the client sends the crop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server_plugin.service.answering import QuestionAnswerer
from server_plugin.service.openai.chat import ChatHandler
from server_plugin.service.openai.intake import ClientIdentity, QuestionIntake
from server_plugin.service.openai.response_store import ResponseStore
from server_plugin.service.openai.responses import ResponsesHandler, unknown_response
from server_plugin.service.openai.transport import Bodies, Sender, headers_of
from server_plugin.service.state import ServiceState
from vlm_collab.openai import ApiError, check_model, deleted_response, model_object, models_list
from vlm_collab.web.streams import ClientGoneError, while_connected

log = logging.getLogger(__name__)


class OpenAiEndpoint:
    """The routes of the OpenAI APIs, and the state that their requests share.

    Args:
        state: see `ServiceState`.
        answerer: runs the engine.

    Attributes:
        bodies: requests in memory.
        responses: responses that can be continued.
        answers: texts of responses, kept longer so that requests can refer to them.
    """

    def __init__(self, state: ServiceState, answerer: QuestionAnswerer) -> None:
        self._state = state
        limits = state.config.openai
        self._intake = QuestionIntake(state, answerer)
        self.bodies = Bodies(
            limits, state.config.limits.question_timeout_s, state.queue.retry_after_s
        )
        self.responses = ResponseStore(limits)
        self.answers = ResponseStore(
            replace(limits, keep_s=limits.keep_answers_s, max_kept_bytes=limits.max_answers_bytes)
        )
        self._created = int(time.time())
        for name, text, value in (
            ("kept_responses", "Responses kept for later requests.", lambda: self.responses.count),
            ("kept_bytes", "Memory that they occupy, in bytes.", lambda: self.responses.nbytes),
            ("body_bytes", "HTTP requests in memory, in bytes.", lambda: self.bodies.nbytes),
        ):
            state.metrics.gauge(name, text, value)

    def routes(self) -> list[Route]:
        """The routes for chat completions, responses and models."""
        chat = ChatHandler(self._intake)
        responses = ResponsesHandler(self._intake, self.responses, self.answers)
        post = ["POST"]
        return [
            Route("/v1/models", self._plain_route(self._models)),
            Route("/v1/models/{name:path}", self._plain_route(self._model)),
            Route(
                "/v1/chat/completions",
                _QuestionRoute(self._state, self.bodies, "chat_completions", chat.answer),
                methods=post,
            ),
            Route(
                "/v1/responses",
                _QuestionRoute(self._state, self.bodies, "responses", responses.answer),
                methods=post,
            ),
            Route("/v1/responses/{id}", self._plain_route(self._forget), methods=["DELETE"]),
        ]

    def shorten_region_waits(self, patience_s: float) -> None:
        """Wait at most `patience_s` for regions that clients were asked for."""
        self._intake.shorten_region_waits(patience_s)

    def shut_down(self) -> None:
        """End all questions, with first answers where there are some."""
        self._intake.shut_down()

    def close(self) -> None:
        """Forget all responses and decode no more pictures."""
        self.responses.clear()
        self.answers.clear()
        self._intake.close()

    def _plain_route(
        self, answer: Callable[[Request], dict[str, Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that needs no model."""

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
        context = self._state.engine.backend.info.context_tokens
        listed = models_list([self._intake.model], self._created, context)
        return {**listed, "data": [self._described(each) for each in listed["data"]]}

    def _model(self, request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        if not name:
            return self._models(request)
        check_model(name, [self._intake.model])
        context = self._state.engine.backend.info.context_tokens
        return self._described(model_object(self._intake.model, self._created, context))

    def _described(self, model: dict[str, Any]) -> dict[str, Any]:
        """Add the view's size and fit, which clients that make their own views need."""
        info = self._state.engine.backend.info
        width, height = info.view
        view = {"view_width": width, "view_height": height, "fit": info.fit.value}
        return {**model, "vlm_collab": view}

    def _forget(self, request: Request) -> dict[str, Any]:
        id = request.path_params["id"]
        tenant = ClientIdentity.from_request(request).tenant
        known = [each.forget(tenant, id) for each in (self.responses, self.answers)]
        if not any(known):
            raise unknown_response(id, "response_id")
        return deleted_response(id)


class _QuestionRoute:
    """A route for questions: reads the request's body, and reports errors."""

    def __init__(
        self,
        state: ServiceState,
        bodies: Bodies,
        kind: str,
        answer: Callable[[ClientIdentity, bytes, Sender], Awaitable[None]],
    ) -> None:
        self._state, self._bodies, self._kind, self._answer = state, bodies, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sender = Sender(send, self._state.config.limits.write_timeout_s)
        counted = self._state.metrics.bytes
        try:
            async with self._bodies.read(request) as body:
                counted.labels(self._kind, "up").inc(len(body))
                client = ClientIdentity.from_request(request)
                await while_connected(receive, self._answer_or_fail(client, body, sender))
        except ApiError as error:
            await self._send_error(error, sender)
        except ClientGoneError:
            log.info("client left", extra={"request": self._kind})
        finally:
            counted.labels(self._kind, "down").inc(sender.sent)

    async def _answer_or_fail(self, client: ClientIdentity, body: bytes, sender: Sender) -> None:
        """Answer; turn an unexpected failure into a 500 unless a stream has begun, which is cut."""
        try:
            await self._answer(client, body, sender)
        except (ApiError, ClientGoneError):
            raise
        except Exception:
            log.exception("request failed", extra={"request": self._kind})
            if sender.started:
                raise
            raise ApiError(500, "the server failed", "server_error", None, "internal") from None

    async def _send_error(self, error: ApiError, sender: Sender) -> None:
        name = error.code or str(error.status)
        log.info("request refused", extra={"request": self._kind, "code": name})
        try:
            await sender.error(error)
        except ClientGoneError:
            log.info("client left", extra={"request": self._kind})
