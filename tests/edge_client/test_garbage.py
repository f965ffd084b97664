"""Servers that break the protocol: one clear error each, and no second attempt."""

from __future__ import annotations

import pytest

from edge_client.client import EdgeClient
from tests.e2e.common import photo
from tests.edge_client.scripted import HASTY, Peer, request, scripted, welcome
from vlm_collab.errors import ErrorCode, ProtocolError
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import Error, Fallback

PHOTO = photo(1)


async def text_frame(peer: Peer) -> None:
    await peer.next()
    await peer.socket.send("hello")


async def noise(peer: Peer) -> None:
    await peer.next()
    await peer.socket.send(b"\xc1\x00\xff")


async def answer_to_nothing(peer: Peer) -> None:
    await peer.greet()
    await peer.socket.send(encode(Error(7, ErrorCode.INTERNAL, "to nobody")))
    await peer.socket.wait_closed()


async def noise_later(peer: Peer) -> None:
    await peer.greet()
    await peer.next_ask()
    await peer.socket.send(b"\x00" * 40)
    await peer.socket.wait_closed()


async def too_large(peer: Peer) -> None:
    await peer.greet()
    await peer.next_ask()
    await peer.socket.send(b"\x00" * (2**21 + 1))
    await peer.socket.wait_closed()


async def second_welcome(peer: Peer) -> None:
    await peer.greet()
    await peer.next_ask()
    peer.session.send_welcome(welcome())
    await peer.flush()
    await peer.socket.wait_closed()


async def other_version(peer: Peer) -> None:
    await peer.next()
    await peer.socket.send(encode(Error(0, ErrorCode.UNSUPPORTED_VERSION, "I speak version 9")))


async def protocol_close(peer: Peer) -> None:
    await peer.greet()
    await peer.next_ask()
    await peer.socket.close(1002, "that was no message")


@pytest.mark.parametrize(
    "script",
    [
        text_frame,
        noise,
        answer_to_nothing,
        noise_later,
        too_large,
        second_welcome,
        other_version,
        protocol_close,
    ],
)
async def test_garbage_is_one_clear_error_and_no_second_attempt(script):
    async with scripted(script) as server:
        client = EdgeClient(server.url, retry=HASTY)
        with pytest.raises(ProtocolError) as caught:
            await client.ask(PHOTO, "why?")
        assert "\n" not in str(caught.value)
        assert server.connections == 1
        await client.close()


async def test_garbage_in_the_second_stage_leaves_the_first_answer():
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask = await peer.next_ask()
        peer.session.request_region(request(ask.id))
        await peer.flush()
        await peer.next()
        await peer.socket.send(b"\xc1")
        await peer.socket.wait_closed()

    async with scripted(script) as server, EdgeClient(server.url, retry=HASTY) as client:
        answer = await client.ask(PHOTO, "why?")
        assert (answer.text, answer.fallback) == ("a first answer", Fallback.SERVER_FAILED)
        assert server.connections == 1
