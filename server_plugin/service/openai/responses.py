"""The Responses API: clients upload whole pictures, or act as the edge.

A client that offers the tool `request_region` cuts regions itself. When the model is unsure, its
question waits in `ResponseStore` between two requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import msgspec

from server_plugin.service.answering import Refused
from server_plugin.service.openai.intake import (
    ClientIdentity,
    QuestionIntake,
    QuestionPictures,
    refusal_error,
)
from server_plugin.service.openai.pending import PendingQuestion, RegionRequested
from server_plugin.service.openai.reply import AnswerStream, region_arguments, result_of
from server_plugin.service.openai.response_store import (
    ByteTally,
    RegionCall,
    ResponseStore,
    StoredResponse,
)
from server_plugin.service.openai.transport import Sender
from vlm_collab.errors import ImageError
from vlm_collab.openai import (
    ApiError,
    CallOutput,
    Conversation,
    Query,
    ResponseBuilder,
    ResponsesRequest,
    Role,
    api_error,
    call_id,
    check_model,
    ignored_header,
    new_response_id,
    parse_responses,
    refuse,
)
from vlm_collab.protocol.messages import Options


@dataclass(frozen=True, slots=True)
class _PendingResponse:
    """One request of the Responses API and its question.

    Attributes:
        client: who sent the request.
        request: as parsed.
        question: the question that this request gets the answer to.
        query: the question as parsed; None if the request brought the region of an earlier one.
        conversation: up to the question.
        pictures: of the conversation.
        instructions: of the request that asked the question.
        tally: bytes of the question's requests and responses before this response.
    """

    client: ClientIdentity
    request: ResponsesRequest
    question: PendingQuestion
    query: Query | None
    conversation: Conversation
    pictures: QuestionPictures
    instructions: str
    tally: ByteTally


class ResponsesHandler:
    """Answers requests to `/v1/responses`.

    Args:
        intake: accepts questions.
        responses: keeps responses for requests that continue them.
        answers: keeps their texts for requests that refer to them.
    """

    def __init__(
        self, intake: QuestionIntake, responses: ResponseStore, answers: ResponseStore
    ) -> None:
        self._intake, self._responses, self._answers = intake, responses, answers

    async def answer(self, client: ClientIdentity, body: bytes, sender: Sender) -> None:
        """Parse a request and answer it; errors as in `ChatHandler.answer`."""
        request = await self._intake.parse(len(body), lambda: self._parse_request(body))
        sender.headers |= ignored_header(request.ignored)
        request = request.resolve_references(lambda id: self._recall_answer(client, id))
        previous = self._previous(client, request)
        if request.outputs:
            pending = await self._resume_question(client, request, previous, len(body))
        else:
            pending = await self._start_question(client, request, previous, len(body))
        await self._respond(pending, sender)

    def _parse_request(self, body: bytes) -> ResponsesRequest:
        request = parse_responses(body, self._intake.wire_limits)
        check_model(request.model, [self._intake.model])
        return request

    def _recall_answer(self, client: ClientIdentity, id: str) -> str | None:
        """Return the text of an earlier response; each use restarts the time that it is kept."""
        stored = self._answers.take(client.tenant, id)
        if stored is None:
            return None
        self._answers.put(client.tenant, id, stored)
        return stored.conversation.lines[-1][1]

    def _previous(self, client: ClientIdentity, request: ResponsesRequest) -> StoredResponse | None:
        """The response that a request continues; None if it continues none."""
        id = request.previous_response_id
        if id is None:
            return None
        stored = self._responses.get(client.tenant, id)
        if stored is None:
            raise unknown_response(id, "previous_response_id")
        return stored

    async def _start_question(
        self,
        client: ClientIdentity,
        request: ResponsesRequest,
        previous: StoredResponse | None,
        body_bytes: int,
    ) -> _PendingResponse:
        """Accept a new question, which may continue a conversation."""
        if previous is not None and previous.call is not None:
            text = (
                f"the previous response requests a region: first send the output of "
                f"{previous.call.id}, with the crop, or with a text to decline"
            )
            raise refuse("input", text, "no_tool_output")
        query, pictures = await self._intake.parse(
            body_bytes, lambda: self._parse_question(request, previous)
        )
        return _PendingResponse(
            client,
            request,
            self._intake.accept(client, query, pictures, client_crops=request.region_tool),
            query,
            request.conversation_after(previous.conversation if previous else None),
            pictures,
            request.instructions,
            ByteTally(up=body_bytes, pictures=pictures.sent_bytes),
        )

    def _parse_question(
        self, request: ResponsesRequest, previous: StoredResponse | None
    ) -> tuple[Query, QuestionPictures]:
        if previous is None:
            query = request.query()
            return query, self._intake.check_pictures(query, {})
        query = request.query(previous.conversation)
        pairs = zip(previous.originals, previous.sources, strict=True)
        return query, self._intake.check_pictures(
            query, {one.data: (one, size) for one, size in pairs}
        )

    async def _resume_question(
        self,
        client: ClientIdentity,
        request: ResponsesRequest,
        previous: StoredResponse | None,
        body_bytes: int,
    ) -> _PendingResponse:
        """Give the region that this request brings to the question that waits for it."""
        id = request.previous_response_id
        if previous is None or id is None:
            text = "give the previous_response_id of the response that requests the region"
            raise refuse("previous_response_id", text, "missing_parameter")
        output, call = _only_output(request, previous)
        _check_unchanged(request, call)
        question = call.question
        # From here on the question belongs to this request: a second request with the same output
        # is refused.
        if not question.pause_region_timeout():
            raise unknown_response(id, "previous_response_id")
        self._responses.take(client.tenant, id)
        tally = call.tally
        tally.up += body_bytes
        try:
            region = None
            if output.picture is not None:
                original = await self._intake.decoding.run(
                    lambda: self._intake.check_picture(output.picture or b"", output.param)
                )
                tally.region = len(original.data)
                target = self._intake.target
                region = await self._intake.decoding.run(lambda: original.region(None, target))
        except (ApiError, ImageError) as error:
            if question.restart_region_timeout():  # the client may send another one
                self._responses.put(client.tenant, id, previous)
            raise api_error(error, param=output.param) from error
        except BaseException:
            question.cancel()
            raise
        question.give_region(region)
        return _PendingResponse(
            client,
            request,
            question,
            None,
            previous.conversation,
            QuestionPictures(previous.originals, previous.sources),
            call.instructions,
            tally,
        )

    async def _respond(self, pending: _PendingResponse, sender: Sender) -> None:
        """Answer with a text, or with a call of the region tool."""
        request, question, tally = pending.request, pending.question, pending.tally
        tenant = pending.client.tenant
        id = new_response_id()
        builder = ResponseBuilder(
            request, id=id, created=int(time.time()), model=self._intake.model
        )
        stream = AnswerStream(question, sender, builder if request.stream else None)
        try:
            event = await stream.last_event()
        except Refused as refused:
            raise refusal_error(refused, pending.query) from refused
        if event is None:
            return
        rest = "" if isinstance(event, RegionRequested) else stream.flow.finish(event.text)
        result = result_of(
            event,
            model=self._intake.model,
            tally=replace(tally, down=tally.down + sender.sent),
            original_bytes=pending.pictures.original_bytes,
            restarted=request.stream and stream.flow.restarted,
        )
        conversation, call = pending.conversation, None
        if isinstance(event, RegionRequested):
            call = RegionCall(call_id(id), question, pending.instructions, tally)
            source = pending.pictures.sources[event.need.picture]
            arguments = region_arguments(event.need, source, self._intake.target)
            end = builder.finish_call if request.stream else builder.whole_call
            last = end(call.id, arguments, result)
        else:
            conversation = conversation.with_answer(result.text)
            last = builder.finish(rest, result) if request.stream else builder.whole(result)
        # Stored before it is sent: the client may continue it at once.
        if request.store or call is not None:
            pictures = pending.pictures
            stored = StoredResponse(conversation, pictures.originals, pictures.sources, call)
            self._responses.put(tenant, id, stored)
        if request.store and call is None:
            answer = Conversation(((Role.ASSISTANT, result.text),))
            self._answers.put(tenant, id, StoredResponse(answer, (), ()))
        if call is not None:
            question.on_end(lambda: self._drop_call(tenant, id))
        try:
            if isinstance(last, bytes):
                await sender.events(last)
                await sender.end()
            else:
                await sender.json(msgspec.json.encode(last))
        except BaseException:
            self._responses.forget(tenant, id)
            self._answers.forget(tenant, id)
            raise
        tally.down += sender.sent

    def _drop_call(self, tenant: bytes, id: str) -> None:
        """Remove a response whose question has ended, so that no region can be sent for it."""
        stored = self._responses.get(tenant, id)
        if stored is not None and stored.call is not None:
            self._responses.take(tenant, id)


def _only_output(
    request: ResponsesRequest, previous: StoredResponse
) -> tuple[CallOutput, RegionCall]:
    """The output that a request brings, and its call.

    Raises:
        ApiError: the request holds anything else, or the output belongs to no open call.
    """
    output, call = request.outputs[0], previous.call
    if call is None or output.call_id != call.id:
        text = f"there is no open call {output.call_id} in the previous response"
        raise refuse("input", text, "unknown_call")
    if len(request.outputs) > 1 or request.conversation.lines or request.conversation.pictures:
        text = "send the function_call_output alone; ask the next question after its answer"
        raise refuse("input", text)
    return output, call


_PARAMS = {
    "eta": "vlm_collab.eta",
    "max_new_tokens": "max_output_tokens",
    "stop": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "tokens": "include",
}


def _check_unchanged(request: ResponsesRequest, call: RegionCall) -> None:
    """Refuse options that differ from those of the request that asked the question.

    Raises:
        ApiError: names the first that differs.
    """
    default, original = Options(), call.question.options
    changed = [
        param
        for name, param in _PARAMS.items()
        if getattr(request.options, name) not in (getattr(default, name), getattr(original, name))
    ]
    if request.instructions not in ("", call.instructions):
        changed.append("instructions")
    for param in changed:
        text = f"{param} was set by the request that asked the question; leave it out here"
        raise refuse(param, text)


def unknown_response(id: str, param: str) -> ApiError:
    """The error for a request that refers to a response that is not kept (any more)."""
    text = (
        f"there is no response {id}: it is unknown here, or it has expired; "
        "ask again with the picture, without previous_response_id"
    )
    return refuse(param, text, "previous_response_not_found", status=404)
