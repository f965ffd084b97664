"""Chat Completions: whole pictures, both stages here."""

from __future__ import annotations

import secrets
import time

import msgspec

from server_plugin.service.answering import Refused
from server_plugin.service.openai.intake import Asker, Client, Pictures, told
from server_plugin.service.openai.pending import Wanted
from server_plugin.service.openai.reply import Reply, result_of
from server_plugin.service.openai.response_store import Tally
from server_plugin.service.openai.transport import Sender
from vlm_collab.openai import ChatStream, Query, check_model, completion, ignored_header, parse_chat


class Chat:
    """Answers requests to `/v1/chat/completions`."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def answer(self, client: Client, body: bytes, sender: Sender) -> None:
        """Read a request and answer it.

        Raises:
            ApiError: it is refused, and nothing has been sent yet.
            ClientGoneError: the client left.
        """
        query, pictures = await self._asker.read(len(body), lambda: self._read(body))
        sender.headers |= ignored_header(query.ignored)
        question = self._asker.ask(client, query, pictures, remote=False)
        tally = Tally(up=len(body), pictures=pictures.sent_bytes)
        id, created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
        writer = ChatStream(
            id=id, created=created, model=self._asker.model, include_usage=query.include_usage
        )
        reply = Reply(question, sender, writer if query.stream else None)
        try:
            settled = await reply.settled()
        except Refused as refused:
            raise told(refused, query) from refused
        if settled is None:
            return
        rest = reply.flow.finish(settled.text) if not isinstance(settled, Wanted) else ""
        tally.down = sender.sent
        result = result_of(
            settled,
            model=self._asker.model,
            tally=tally,
            original_bytes=pictures.original_bytes,
            restarted=query.stream and reply.flow.restarted,
        )
        if query.stream:
            await sender.events(writer.finish(rest, result))
            await sender.end()
        else:
            whole = completion(result, id=id, created=created, model=self._asker.model)
            await sender.json(msgspec.json.encode(whole))

    def _read(self, body: bytes) -> tuple[Query, Pictures]:
        query = parse_chat(body, self._asker.wire)
        check_model(query.model, [self._asker.model])
        return query, self._asker.pictures(query, {})
