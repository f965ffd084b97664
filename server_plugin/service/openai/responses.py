"""The Responses API: whole pictures as well, or the client as the edge.

A client that offers the tool `request_region` cuts regions itself. A question that the model is
unsure of then waits in `Memory` between two requests.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

import msgspec

from server_plugin.service.answering import Refused
from server_plugin.service.openai.intake import Asker, Client, Pictures, told
from server_plugin.service.openai.pending import Question, Wanted
from server_plugin.service.openai.reply import Reply, arguments_of, result_of
from server_plugin.service.openai.response_store import Call, Kept, Memory, Tally
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
    parse_responses,
    refuse,
)
from vlm_collab.protocol.messages import Options


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request of the Responses API and the question that it waits for.

    Attributes:
        client, request: who asks, and how.
        question: what is waited for.
        query: what the request asks; None if it brought the region of an earlier one's question.
        conversation: up to the question.
        pictures: of the conversation.
        instructions: that the question was asked under.
        tally: bytes of the requests and responses before this response.
    """

    client: Client
    request: ResponsesRequest
    question: Question
    query: Query | None
    conversation: Conversation
    pictures: Pictures
    instructions: str
    tally: Tally


class Responses:
    """Answers requests to `/v1/responses`.

    Args:
        asker: has questions answered.
        memory: keeps responses for later requests.
        answers: keeps what they said, for requests that refer to it.
    """

    def __init__(self, asker: Asker, memory: Memory, answers: Memory) -> None:
        self._asker, self._memory, self._answers = asker, memory, answers

    async def answer(self, client: Client, body: bytes, sender: Sender) -> None:
        """Read a request and answer it; errors as `Chat.answer`."""
        request = await self._asker.read(len(body), lambda: self._read_request(body))
        sender.headers |= ignored_header(request.ignored)
        request = request.resolve_references(lambda id: self._answer(client, id))
        before = self._before(client, request)
        if request.outputs:
            turn = await self._resumed(client, request, before, len(body))
        else:
            turn = await self._begun(client, request, before, len(body))
        await self._respond(turn, sender)

    def _read_request(self, body: bytes) -> ResponsesRequest:
        request = parse_responses(body, self._asker.wire)
        check_model(request.model, [self._asker.model])
        return request

    def _answer(self, client: Client, id: str) -> str | None:
        """What a response said, which is kept for longer each time that it is referred to."""
        kept = self._answers.take(client.tenant, id)
        if kept is None:
            return None
        self._answers.put(client.tenant, id, kept)
        return kept.conversation.lines[-1][1]

    def _before(self, client: Client, request: ResponsesRequest) -> Kept | None:
        id = request.previous_response_id
        if id is None:
            return None
        kept = self._memory.get(client.tenant, id)
        if kept is None:
            raise unknown_response(id, "previous_response_id")
        return kept

    async def _begun(
        self, client: Client, request: ResponsesRequest, before: Kept | None, body_bytes: int
    ) -> _Turn:
        """A question of its own, or one that follows another."""
        if before is not None and before.call is not None:
            text = (
                f"the previous response asked for a region: first send the output of "
                f"{before.call.id}, with the crop or, to do without it, a text"
            )
            raise refuse("input", text, "no_tool_output")
        query, pictures = await self._asker.read(
            body_bytes, lambda: self._read_question(request, before)
        )
        return _Turn(
            client,
            request,
            self._asker.ask(client, query, pictures, remote=request.region_tool),
            query,
            request.conversation_after(before.conversation if before else None),
            pictures,
            request.instructions,
            Tally(up=body_bytes, pictures=pictures.sent_bytes),
        )

    def _read_question(
        self, request: ResponsesRequest, before: Kept | None
    ) -> tuple[Query, Pictures]:
        if before is None:
            query = request.query()
            return query, self._asker.pictures(query, {})
        query = request.query(before.conversation)
        pairs = zip(before.originals, before.sources, strict=True)
        return query, self._asker.pictures(query, {one.data: (one, size) for one, size in pairs})

    async def _resumed(
        self, client: Client, request: ResponsesRequest, before: Kept | None, body_bytes: int
    ) -> _Turn:
        """The question that waits for the region that this request brings."""
        id = request.previous_response_id
        if before is None or id is None:
            text = "give the previous_response_id of the response that asked for the region"
            raise refuse("previous_response_id", text, "missing_parameter")
        output, call = _only_output(request, before)
        _check_unchanged(request, call)
        question = call.question
        # From here on it is this request's: another one with the same output finds nothing.
        if not question.hold_deadline():
            raise unknown_response(id, "previous_response_id")
        self._memory.take(client.tenant, id)
        tally = call.tally
        tally.up += body_bytes
        try:
            region = None
            if output.picture is not None:
                original = await self._asker.workshop.run(
                    lambda: self._asker.checked(output.picture or b"", output.param)
                )
                tally.region = len(original.data)
                target = self._asker.target
                region = await self._asker.workshop.run(lambda: original.region(None, target))
        except (ApiError, ImageError) as error:
            if question.resume_deadline():  # the client may send another one
                self._memory.put(client.tenant, id, before)
            raise api_error(error, param=output.param) from error
        except BaseException:
            question.cancel()
            raise
        question.give_region(region)
        return _Turn(
            client,
            request,
            question,
            None,
            before.conversation,
            Pictures(before.originals, before.sources),
            call.instructions,
            tally,
        )

    async def _respond(self, turn: _Turn, sender: Sender) -> None:
        """Answer with a text, or with a call of the region tool."""
        request, question, tally = turn.request, turn.question, turn.tally
        id = f"resp_{secrets.token_hex(24)}"
        builder = ResponseBuilder(request, id=id, created=int(time.time()), model=self._asker.model)
        reply = Reply(question, sender, builder if request.stream else None)
        try:
            settled = await reply.settled()
        except Refused as refused:
            raise told(refused, turn.query) from refused
        if settled is None:
            return
        rest = "" if isinstance(settled, Wanted) else reply.flow.finish(settled.text)
        result = result_of(
            settled,
            model=self._asker.model,
            tally=replace(tally, down=tally.down + sender.sent),
            original_bytes=turn.pictures.original_bytes,
            restarted=request.stream and reply.flow.restarted,
        )
        conversation, call = turn.conversation, None
        if isinstance(settled, Wanted):
            call = Call(call_id(id), question, turn.instructions, tally)
            source = turn.pictures.sources[settled.need.picture]
            where = arguments_of(settled.need, source, self._asker.target)
            end = builder.finish_call if request.stream else builder.whole_call
            last = end(call.id, where, result)
        else:
            conversation = conversation.with_answer(result.text)
            last = builder.finish(rest, result) if request.stream else builder.whole(result)
        # Kept before it is told: the client may be back at once.
        if request.store or call is not None:
            kept = Kept(conversation, turn.pictures.originals, turn.pictures.sources, call)
            self._memory.put(turn.client.tenant, id, kept)
        if request.store and call is None:
            said = Conversation(((Role.ASSISTANT, result.text),))
            self._answers.put(turn.client.tenant, id, Kept(said, (), ()))
        if call is not None:
            question.when_over(lambda: self._call_over(turn.client.tenant, id))
        try:
            if isinstance(last, bytes):
                await sender.events(last)
                await sender.end()
            else:
                await sender.json(msgspec.json.encode(last))
        except BaseException:
            self._memory.forget(turn.client.tenant, id)
            self._answers.forget(turn.client.tenant, id)
            raise
        tally.down += sender.sent

    def _call_over(self, tenant: bytes, id: str) -> None:
        """Nobody can bring the region any more."""
        kept = self._memory.get(tenant, id)
        if kept is not None and kept.call is not None:
            self._memory.take(tenant, id)


def _only_output(request: ResponsesRequest, before: Kept) -> tuple[CallOutput, Call]:
    """The output that a request brings, and the call it is of.

    Raises:
        ApiError: it brings more than that, or it is of no call that is open.
    """
    output, call = request.outputs[0], before.call
    if call is None or output.call_id != call.id:
        text = f"there is no open call {output.call_id} in the previous response"
        raise refuse("input", text, "unknown_call")
    if len(request.outputs) > 1 or request.conversation.lines or request.conversation.pictures:
        text = "send the function_call_output alone; ask further when it has been answered"
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


def _check_unchanged(request: ResponsesRequest, call: Call) -> None:
    """Refuse wishes that come too late; those that the question was asked with hold.

    Raises:
        ApiError: for the first that differs.
    """
    default, asked = Options(), call.question.options
    changed = [
        param
        for name, param in _PARAMS.items()
        if getattr(request.options, name) not in (getattr(default, name), getattr(asked, name))
    ]
    if request.instructions not in ("", call.instructions):
        changed.append("instructions")
    for param in changed:
        text = f"{param} holds from the request that asked the question; leave it out here"
        raise refuse(param, text)


def unknown_response(id: str, param: str) -> ApiError:
    """What a client is told that goes on from a response that is not kept (any more)."""
    text = (
        f"there is no response {id} any more: it is unknown here, or the time to go on from it is "
        "over; ask again with the picture, without previous_response_id"
    )
    return refuse(param, text, "previous_response_not_found", status=404)
