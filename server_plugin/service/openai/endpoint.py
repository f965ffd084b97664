"""`/v1/chat/completions`, `/v1/responses` and `/v1/models` on the service itself.

A client uploads whole pictures, and both stages run here. Or, in the Responses API, it offers the
tool `request_region`: then it is the edge, its pictures are views, and a question that the model
is unsure of waits in `Memory` until the client sends the crop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from PIL.Image import Image
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server_plugin.engine import RegionNeed, RegionUnavailableError
from server_plugin.service.answering import Refused
from server_plugin.service.openai.memory import Call, Kept, Memory, Tally
from server_plugin.service.openai.question import Question, Wanted
from server_plugin.service.openai.reply import Reply, arguments_of, error_of, result_of
from server_plugin.service.openai.transport import (
    Bodies,
    ClientGoneError,
    Sender,
    while_connected,
)
from server_plugin.service.openai.whole import Gallery, Held, Original, Workshop
from vlm_collab.errors import ErrorCode, ImageError
from vlm_collab.geometry import Size
from vlm_collab.messages import Fallback, Options
from vlm_collab.openai import (
    ApiError,
    CallOutput,
    ChatStream,
    Conversation,
    PictureSource,
    Query,
    ResponseBuilder,
    ResponsesRequest,
    Url,
    WireLimits,
    api_error,
    check_model,
    completion,
    model_object,
    models_list,
    parse_chat,
    parse_responses,
    refuse,
)

if TYPE_CHECKING:
    from server_plugin.service.app import Service

log = logging.getLogger(__name__)

_ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

Guard: TypeAlias = Callable[[HTTPConnection], ApiError | None]
"""Why a client is not let in; None if it is."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    Attributes:
        tenant: what is kept belongs to it: to everyone with the same key.
        session: between sessions, turns at the model alternate.
    """

    tenant: bytes
    session: Hashable

    @classmethod
    def of(cls, request: HTTPConnection) -> Client:
        """By the key and the address that a request comes with."""
        key = request.headers.get("authorization", "")
        tenant = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return cls(tenant, ("http", tenant, request.client.host if request.client else ""))


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a question.

    Attributes:
        originals: as they were sent.
        sources: sizes of what they show, in px.
        sent_bytes: of those that came with this request.
    """

    originals: tuple[Original, ...]
    sources: tuple[Size, ...]
    sent_bytes: int = 0

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the originals; None if some are elsewhere, and these are views of them."""
        whole = all(map(_is_whole, self.originals, self.sources))
        return sum(len(original.data) for original in self.originals) if whole else None


def _is_whole(original: Original, source: Size) -> bool:
    return original.size == source


class OpenAiEndpoint:
    """The endpoint's routes, and what its requests share.

    Args:
        service: whose engine answers.
        guard: decides who is let in.

    Attributes:
        memory: responses that can be gone on from.
    """

    def __init__(self, service: Service, guard: Guard) -> None:
        self.guard = guard
        self._service = service
        limits, info = service.config.openai, service.engine.backend.info
        self._model = info.name
        self._max_pixels = limits.max_picture_pixels
        self._wire = WireLimits(
            max_body_bytes=limits.max_body_bytes, max_picture_bytes=limits.max_body_bytes
        )
        self._workshop = Workshop(limits)
        self._gallery = Gallery(
            service.views,
            self._workshop,
            info.view,
            info.fit,
            service.config.limits.max_sessions,
        )
        self.bodies = Bodies(limits, service.config.limits.question_timeout_s)
        self.memory = Memory(limits)
        self._questions: set[Question] = set()
        self._created = int(time.time())
        for name, text, value in (
            ("kept_responses", "Responses kept for later requests.", lambda: self.memory.count),
            ("kept_bytes", "Memory that they occupy, in bytes.", lambda: self.memory.nbytes),
            ("body_bytes", "HTTP requests in memory, in bytes.", lambda: self.bodies.nbytes),
        ):
            service.metrics.gauge(name, text, value)

    def routes(self) -> list[Route]:
        """The routes."""
        chat = _Post(self._service, self, "chat_completions", self._chat)
        responses = _Post(self._service, self, "responses", self._responses)
        return [
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/responses/{id}", self._delete_response, methods=["DELETE"]),
            Route("/v1/{rest:path}", self._elsewhere, methods=_ALL_METHODS),
        ]

    def hurry(self, patience_s: float) -> None:
        """Wait so long at most for clients that were asked for a region."""
        for question in self._questions:
            question.hurry(patience_s)

    def shut_down(self) -> None:
        """End what is in flight, with first answers where there are some."""
        for question in list(self._questions):
            question.shut_down()

    def close(self) -> None:
        """Forget what is kept."""
        self.memory.clear()

    # ---- models, and forgetting --------------------------------------------------------------

    async def _list_models(self, request: Request) -> Response:
        if (error := self.guard(request)) is not None:
            return _told(error)
        listed = models_list([self._model], self._created)
        return _json({**listed, "data": [self._described(each) for each in listed["data"]]})

    async def _show_model(self, request: Request) -> Response:
        if (error := self.guard(request)) is not None:
            return _told(error)
        try:
            check_model(request.path_params["name"], [self._model])
        except ApiError as unknown:
            return _told(unknown)
        return _json(self._described(model_object(self._model, self._created)))

    def _described(self, model: dict[str, Any]) -> dict[str, Any]:
        """With what a client that makes its own views needs to know."""
        info = self._service.engine.backend.info
        width, height = info.view
        view = {"view_width": width, "view_height": height, "fit": info.fit.value}
        return {**model, "vlm_collab": view}

    async def _delete_response(self, request: Request) -> Response:
        if (error := self.guard(request)) is not None:
            return _told(error)
        id = request.path_params["id"]
        if not self.memory.forget(Client.of(request).tenant, id):
            return _told(_unknown(id, "response_id"))
        return _json({"id": id, "object": "response", "deleted": True})

    async def _elsewhere(self, request: Request) -> Response:
        if (error := self.guard(request)) is not None:
            return _told(error)
        text = f"there is no {request.method} {request.url.path} here"
        return _told(ApiError(404, text, code="unknown_url"))

    # ---- asking ------------------------------------------------------------------------------

    def _pictures(
        self, query: Query, known: Mapping[PictureSource, tuple[Original, Size]]
    ) -> Pictures:
        """Check a question's pictures. Hashes them, so not for the event loop.

        Args:
            known: those that came with earlier requests.

        Raises:
            ApiError: one cannot be used.
        """
        originals, sources, sent_bytes = [], [], 0
        for data, param in zip(query.pictures, query.picture_params, strict=True):
            if data in known:
                original, source = known[data]
            else:
                original = self._checked(data, param)
                source = original.size
                sent_bytes += len(original.data)
            originals.append(original)
            sources.append(source)
        stated = tuple(Size(*source) for source in query.sources)
        return Pictures(tuple(originals), stated or tuple(sources), sent_bytes)

    def _checked(self, data: PictureSource, param: str) -> Original:
        if isinstance(data, Url):
            text = f"{param}: this server fetches no pictures; send a data URL"
            raise refuse(param, text, "unsupported_image_url")
        try:
            return Original.checked(data, self._max_pixels)
        except ImageError as error:
            raise api_error(error, param=param) from error

    def _ask(self, client: Client, query: Query, pictures: Pictures, *, remote: bool) -> Question:
        """Have a question answered.

        Args:
            remote: the client cuts regions itself.

        Raises:
            ApiError: it is refused before anything is computed.
        """

        async def hold() -> Held:
            return await self._gallery.hold(client.tenant, pictures.originals, pictures.sources)

        async def crop(need: RegionNeed) -> Image:
            original = pictures.originals[need.picture]
            if not _is_whole(original, pictures.sources[need.picture]):
                raise RegionUnavailableError(Fallback.DECLINED)  # the client has it, not we
            target = self._service.engine.target
            return await self._workshop.run(lambda: original.region(need.box, target))

        try:
            question = Question(
                self._service,
                client.session,
                query.question,
                query.history,
                msgspec.structs.replace(query.options, stream=query.stream),
                hold if pictures.originals else None,
                pictures.sources,
                None if remote else crop,
            )
        except Refused as refused:
            raise error_of(refused, _param(refused, query)) from refused
        self._questions.add(question)
        question.when_over(lambda: self._questions.discard(question))
        return question

    # ---- chat completions --------------------------------------------------------------------

    async def _chat(self, client: Client, body: bytes, sender: Sender) -> None:
        query, pictures = await asyncio.to_thread(self._read_chat, body)
        question = self._ask(client, query, pictures, remote=False)
        tally = Tally(up=len(body), pictures=pictures.sent_bytes)
        id, created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
        writer = ChatStream(
            id=id, created=created, model=self._model, include_usage=query.include_usage
        )
        reply = Reply(question, sender, writer if query.stream else None)
        try:
            settled = await reply.settled()
        except Refused as refused:
            raise error_of(refused, _param(refused, query)) from refused
        if settled is None:
            return
        rest = reply.flow.finish(settled.text) if not isinstance(settled, Wanted) else ""
        tally.down = sender.sent
        result = result_of(
            settled,
            model=self._model,
            tally=tally,
            original_bytes=pictures.original_bytes,
            restarted=query.stream and reply.flow.restarted,
        )
        if query.stream:
            await sender.events(writer.finish(rest, result))
            await sender.end()
        else:
            whole = completion(result, id=id, created=created, model=self._model)
            await sender.json(msgspec.json.encode(whole))

    def _read_chat(self, body: bytes) -> tuple[Query, Pictures]:
        query = parse_chat(body, self._wire)
        check_model(query.model, [self._model])
        return query, self._pictures(query, {})

    # ---- responses ---------------------------------------------------------------------------

    async def _responses(self, client: Client, body: bytes, sender: Sender) -> None:
        request = await asyncio.to_thread(self._read_request, body)
        before = self._before(client, request)
        if request.outputs:
            turn = await self._resumed(client, request, before, len(body))
        else:
            turn = await self._begun(client, request, before, len(body))
        await self._respond(turn, sender)

    def _read_request(self, body: bytes) -> ResponsesRequest:
        request = parse_responses(body, self._wire)
        check_model(request.model, [self._model])
        return request

    def _before(self, client: Client, request: ResponsesRequest) -> Kept | None:
        id = request.previous_response_id
        if id is None:
            return None
        kept = self.memory.get(client.tenant, id)
        if kept is None:
            raise _unknown(id, "previous_response_id")
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
        query, pictures = await asyncio.to_thread(self._read_question, request, before)
        return _Turn(
            client,
            request,
            self._ask(client, query, pictures, remote=request.region_tool),
            query,
            request.whole(before.conversation if before else None),
            pictures,
            request.instructions,
            Tally(up=body_bytes, pictures=pictures.sent_bytes),
        )

    def _read_question(
        self, request: ResponsesRequest, before: Kept | None
    ) -> tuple[Query, Pictures]:
        if before is None:
            query = request.query()
            return query, self._pictures(query, {})
        query = request.query(before.conversation)
        pairs = zip(before.originals, before.sources, strict=True)
        return query, self._pictures(query, {one.data: (one, size) for one, size in pairs})

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
            raise _unknown(id, "previous_response_id")
        self.memory.take(client.tenant, id)
        tally = call.tally
        tally.up += body_bytes
        try:
            region = None
            if output.picture is not None:
                original = await self._workshop.run(
                    lambda: self._checked(output.picture or b"", output.param)
                )
                tally.region = len(original.data)
                target = self._service.engine.target
                region = await self._workshop.run(lambda: original.region(None, target))
        except (ApiError, ImageError) as error:
            if question.resume_deadline():  # the client may send another one
                self.memory.put(client.tenant, id, before)
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
        builder = ResponseBuilder(request, id=id, created=int(time.time()), model=self._model)
        reply = Reply(question, sender, builder if request.stream else None)
        try:
            settled = await reply.settled()
        except Refused as refused:
            raise error_of(refused, _param(refused, turn.query)) from refused
        if settled is None:
            return
        wanted = isinstance(settled, Wanted)
        rest = "" if isinstance(settled, Wanted) else reply.flow.finish(settled.text)
        counted = replace(tally, down=tally.down + sender.sent)
        result = result_of(
            settled,
            model=self._model,
            tally=counted,
            original_bytes=turn.pictures.original_bytes,
            restarted=request.stream and reply.flow.restarted,
        )
        conversation = turn.conversation if wanted else turn.conversation.answered(result.text)
        call = None
        if isinstance(settled, Wanted):
            call = Call(f"call_{secrets.token_hex(12)}", question, turn.instructions, tally)
        # Before it is told: the client may be back at once.
        if request.store or call is not None:
            kept = Kept(conversation, turn.pictures.originals, turn.pictures.sources, call)
            self.memory.put(turn.client.tenant, id, kept)
        if call is not None:
            question.when_over(lambda: self._call_over(turn.client.tenant, id))
        try:
            if isinstance(settled, Wanted) and call is not None:
                need, target = settled.need, self._service.engine.target
                where = arguments_of(need, turn.pictures.sources[need.picture], target)
                if request.stream:
                    await sender.events(builder.finish_call(call.id, where, result))
                else:
                    called = builder.whole_call(call.id, where, result)
                    await sender.json(msgspec.json.encode(called))
            elif request.stream:
                await sender.events(builder.finish(rest, result))
            else:
                await sender.json(msgspec.json.encode(builder.whole(result)))
            if request.stream:
                await sender.end()
        except BaseException:
            self.memory.forget(turn.client.tenant, id)
            raise
        tally.down += sender.sent

    def _call_over(self, tenant: bytes, id: str) -> None:
        kept = self.memory.get(tenant, id)
        if kept is not None and kept.call is not None:
            self.memory.take(tenant, id)


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


class _Post:
    """One route that takes a question: who is let in, how much is read, what goes wrong."""

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
            if (error := self._endpoint.guard(request)) is not None:
                raise error
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


def _unknown(id: str, param: str) -> ApiError:
    text = (
        f"there is no response {id} any more: it is unknown here, or the time to go on from it is "
        "over; ask again with the picture, without previous_response_id"
    )
    return refuse(param, text, "previous_response_not_found", status=404)


def _param(refused: Refused, query: Query | None) -> str | None:
    """The parameter at fault, as far as it is known."""
    if query is None:
        return None
    if refused.code is ErrorCode.BAD_QUESTION:
        return query.question_param
    if refused.code is ErrorCode.BAD_IMAGE and len(query.picture_params) == 1:
        return query.picture_params[0]
    return None


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def _told(error: ApiError) -> Response:
    return Response(error.encoded(), error.status, error.headers(), "application/json")
