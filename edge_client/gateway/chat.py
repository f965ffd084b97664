"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.admission import Admission
from edge_client.gateway.answerer import Answerer
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.forwarding import forward_chat
from edge_client.gateway.http import admitted, json_response, read_json
from edge_client.gateway.streaming import answer_pieces, stream_response
from vlm_collab.openai import (
    ChatStream,
    TextStream,
    chat_is_text,
    completion,
    ignored_header,
    new_completion_id,
    parse_chat,
    without_ignored,
)
from vlm_collab.web.streams import while_connected


class ChatEndpoint:
    """Answers Chat Completions requests, and forwards those without pictures to the server.

    Args:
        config: see `GatewayConfig`.
        admission: admits the requests.
    """

    def __init__(self, config: GatewayConfig, admission: Admission) -> None:
        self._config = config
        self._admission = admission

    async def answer(self, request: Request, camera: Answerer) -> Response:
        """Answer a request under a camera's rules.

        Raises:
            CollabError: it is refused, or there is no answer.
            ClientGoneError, ClientDisconnect: the client disconnected.
        """
        limits = self._config.limits
        async with admitted(request, self._admission, limits) as slot:
            body = await read_json(request, slot, limits)
            kept, ignored = await asyncio.to_thread(without_ignored, body)
            if await asyncio.to_thread(chat_is_text, kept):
                aliases = self._config.aliases
                return await forward_chat(request, camera, kept, ignored, slot, aliases)
            query = await asyncio.to_thread(parse_chat, body, limits.wire)
            id, created = new_completion_id(), int(time.time())
            model = await while_connected(request.receive, camera.model_name(query))
            headers = ignored_header(query.ignored)
            if query.stream:
                form = ChatStream(
                    id=id, created=created, model=model, include_usage=query.include_usage
                )
                pieces = answer_pieces(
                    lambda on_text: camera.answer(query, on_text),
                    form,
                    TextStream(query.options.stop),
                    buffered=query.options.tokens,
                    finished=lambda result: None,
                )
                return await stream_response(request, pieces, slot, headers)
            result = await while_connected(request.receive, camera.answer(query, None))
            reply = completion(result, id=id, created=created, model=model)
            return json_response(reply, headers=headers)
