"""`POST /v1/responses` and `DELETE /v1/responses/{id}`."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.admission import Admission
from edge_client.gateway.answerer import Answerer
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.conversation_store import ConversationStore
from edge_client.gateway.http import admitted, json_response, read_json
from edge_client.gateway.streaming import answer_pieces, stream_response
from vlm_collab.openai import (
    ResponseBuilder,
    Result,
    TextStream,
    Url,
    deleted_response,
    ignored_header,
    new_response_id,
    parse_responses,
    refuse,
)
from vlm_collab.web.streams import while_connected


class ResponsesEndpoint:
    """Answers requests of the Responses API.

    Args:
        config: see `GatewayConfig`.
        admission: admits the requests.
    """

    def __init__(self, config: GatewayConfig, admission: Admission) -> None:
        limits = config.limits
        self._limits = limits
        self._admission = admission
        self._store = ConversationStore(
            limits.max_responses,
            limits.max_response_bytes,
            max_answers=limits.max_answers,
            max_answer_bytes=limits.max_answer_bytes,
        )

    async def answer(self, request: Request, camera: Answerer) -> Response:
        """Answer a request under a camera's rules.

        Raises:
            CollabError: it is refused, or there is no answer.
            ClientGoneError, ClientDisconnect: the client disconnected.
        """
        async with admitted(request, self._admission, self._limits) as slot:
            body = await read_json(request, slot, self._limits)
            parsed = await asyncio.to_thread(parse_responses, body, self._limits.wire)
            parsed = parsed.resolve_references(lambda id: self._store.answer(camera.camera, id))
            if parsed.region_tool or parsed.outputs:
                raise refuse(
                    "tools" if parsed.region_tool else "input",
                    "this gateway answers region requests by itself: send the original picture, "
                    "and no tools",
                    "unsupported_parameter",
                )
            previous = self._store.get(camera.camera, parsed.previous_response_id)
            query = parsed.query(previous)
            id, created = new_response_id(), int(time.time())
            model = await while_connected(request.receive, camera.model_name(query))
            builder = ResponseBuilder(parsed, id=id, created=created, model=model)
            headers = ignored_header(query.ignored)
            fetched: dict[Url, bytes] = {}

            def keep(result: Result) -> None:
                if parsed.store:
                    # The fetched bytes are kept: the URL may serve another picture later.
                    conversation = (
                        parsed.conversation_after(previous)
                        .with_fetched(fetched)
                        .with_answer(result.text)
                    )
                    self._store.keep(camera.camera, id, conversation, result.text)

            if query.stream:
                pieces = answer_pieces(
                    lambda on_text: camera.answer(query, on_text, fetched),
                    builder,
                    TextStream(query.options.stop),
                    buffered=query.options.tokens,
                    finished=keep,
                )
                return await stream_response(request, pieces, slot, headers)
            result = await while_connected(request.receive, camera.answer(query, None, fetched))
            keep(result)
            return json_response(builder.whole(result), headers=headers)

    async def delete(self, request: Request, camera: Answerer) -> Response:
        """Delete a stored response.

        Raises:
            ApiError: there is none with this id (404).
        """
        id = str(request.path_params["id"])
        self._store.forget(camera.camera, id)
        return json_response(deleted_response(id))
