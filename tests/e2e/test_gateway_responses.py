"""Continued and deleted responses, with the official SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from tests.e2e.common import SURE, photo, view_digest
from tests.e2e.gateways import MODEL, Deployment, deployed, item


@asynccontextmanager
async def camera(show: Callable[[int], bytes | None]) -> AsyncIterator[str]:
    """A camera that serves a new picture at each request, or 404 for None; yields its host."""
    requests = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await reader.readuntil(b"\r\n\r\n")
        data, requests = show(requests), requests + 1
        status = b"404 Not Found" if data is None else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n" + (data or b""))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def snapshot(question: str, host: str) -> dict[str, Any]:
    """A user item about a camera's current picture."""
    image = {"type": "input_image", "image_url": f"http://{host}/now.jpg"}
    return {"role": "user", "content": [{"type": "input_text", "text": question}, image]}


async def respond(deployment: Deployment, question: Any, stream: bool = False, **more: Any) -> Any:
    """Ask for a response, streamed or not."""
    reply = await deployment.client.responses.create(
        model=MODEL, input=question, stream=stream, **more
    )
    if not stream:
        return reply
    return [event async for event in reply][-1].response


@pytest.mark.parametrize("stream", [False, True])
async def test_a_follow_up_is_about_the_picture_that_was_fetched(stream: bool):
    async with (
        camera(lambda count: photo(1) if count == 0 else None) as host,
        deployed(fetch_hosts=frozenset({host})) as deployment,
    ):
        first = await respond(deployment, [snapshot(SURE, host)], stream)
        later = await respond(deployment, "and the sea?", stream, previous_response_id=first.id)
        assert later.output_text.startswith(f"first {view_digest(photo(1))} {SURE} ")
        assert later.vlm_collab["view_bytes"] == 0
        last = await respond(deployment, "the land?", stream, previous_response_id=later.id)
        assert last.output_text.startswith(f"first {view_digest(photo(1))} {SURE} ")


async def test_a_repeated_url_is_fetched_again():
    async with (
        camera(lambda count: photo([1, 2, 1][count])) as host,
        deployed(fetch_hosts=frozenset({host})) as deployment,
    ):
        first = await respond(deployment, [snapshot(SURE, host)])
        later = await respond(deployment, [snapshot("now?", host)], previous_response_id=first.id)
        both = f"{view_digest(photo(1))}+{view_digest(photo(2))}"
        assert later.output_text.startswith(f"first {both} ")
        # The camera shows its first picture again, which counts once.
        last = await respond(deployment, [snapshot("now?", host)], previous_response_id=later.id)
        assert last.output_text.startswith(f"first {both} ")
        assert last.vlm_collab["view_bytes"] == 0


async def test_fetched_pictures_count_towards_max_response_bytes():
    async with (
        camera(lambda count: photo(count + 1)) as host,
        deployed(
            fetch_hosts=frozenset({host}),
            limits={"max_response_bytes": len(photo(1)) + len(photo(2)) - 1},
        ) as deployment,
    ):
        first = await respond(deployment, [snapshot(SURE, host)])
        second = await respond(deployment, [snapshot(SURE, host)])
        with pytest.raises(openai.BadRequestError, match="or it was dropped"):
            await respond(deployment, "?", previous_response_id=first.id)
        assert (await respond(deployment, "?", previous_response_id=second.id)).output_text


async def test_a_response_can_be_deleted():
    async with deployed(api_key="right") as deployment:
        deployment.client.api_key = "right"
        first = await respond(deployment, [item(SURE, photo(1))])
        later = await respond(deployment, "?", previous_response_id=first.id)
        reply = await deployment.client.responses.with_raw_response.delete(first.id)
        assert reply.status_code == 200
        assert reply.http_response.json() == {"id": first.id, "object": "response", "deleted": True}
        for unknown in (first.id, "resp_1"):
            with pytest.raises(openai.NotFoundError) as caught:
                await deployment.client.responses.delete(unknown)
            assert caught.value.param == "response_id"
            assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError):
            await respond(deployment, "?", previous_response_id=first.id)
        # A response that continued it is still stored.
        assert (await respond(deployment, "?", previous_response_id=later.id)).output_text
        with pytest.raises(openai.AuthenticationError):
            await deployment.client.with_options(api_key="wrong").responses.delete(later.id)
