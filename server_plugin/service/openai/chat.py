"""The Chat Completions API: clients upload whole pictures, and both stages run here."""

from __future__ import annotations

import time

import msgspec

from server_plugin.service.answering import Refused
from server_plugin.service.openai.intake import (
    ClientIdentity,
    QuestionIntake,
    QuestionPictures,
    refusal_error,
)
from server_plugin.service.openai.pending import RegionRequested
from server_plugin.service.openai.reply import AnswerStream, result_of
from server_plugin.service.openai.response_store import ByteTally
from server_plugin.service.openai.transport import Sender
from vlm_collab.openai import (
    ChatStream,
    Query,
    check_model,
    completion,
    ignored_header,
    new_completion_id,
    parse_chat,
)


class ChatHandler:
    """Answers requests to `/v1/chat/completions`."""

    def __init__(self, intake: QuestionIntake) -> None:
        self._intake = intake

    async def answer(self, client: ClientIdentity, body: bytes, sender: Sender) -> None:
        """Parse a request and answer it.

        Raises:
            ApiError: it is refused, and nothing has been sent yet.
            ClientGoneError: the client left.
        """
        query, pictures = await self._intake.parse(len(body), lambda: self._parse(body))
        sender.headers |= ignored_header(query.ignored)
        question = self._intake.accept(client, query, pictures, client_crops=False)
        tally = ByteTally(up=len(body), pictures=pictures.sent_bytes)
        id, created = new_completion_id(), int(time.time())
        writer = ChatStream(
            id=id, created=created, model=self._intake.model, include_usage=query.include_usage
        )
        stream = AnswerStream(question, sender, writer if query.stream else None)
        try:
            event = await stream.last_event()
        except Refused as refused:
            raise refusal_error(refused, query) from refused
        if event is None:
            return
        rest = stream.flow.finish(event.text) if not isinstance(event, RegionRequested) else ""
        tally.down = sender.sent
        result = result_of(
            event,
            model=self._intake.model,
            tally=tally,
            original_bytes=pictures.original_bytes,
            restarted=query.stream and stream.flow.restarted,
        )
        if query.stream:
            await sender.events(writer.finish(rest, result))
            await sender.end()
        else:
            reply = completion(result, id=id, created=created, model=self._intake.model)
            await sender.json(msgspec.json.encode(reply))

    def _parse(self, body: bytes) -> tuple[Query, QuestionPictures]:
        query = parse_chat(body, self._intake.wire_limits)
        check_model(query.model, [self._intake.model])
        return query, self._intake.check_pictures(query, {})
