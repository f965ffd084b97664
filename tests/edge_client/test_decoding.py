"""How much of a large photo is decoded for a question."""

from __future__ import annotations

import pytest
from PIL.ImageFile import ImageFile

from edge_client.client import EdgeClient
from edge_client.privacy.policy import CameraPolicy, PrivacyPolicy
from tests.edge_client.scripted import Peer, request, scripted
from tests.support.pictures import photo, saved
from vlm_collab.protocol.messages import Decline, Region, Stage


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the pictures that are decoded."""
    sizes: list[tuple[int, int]] = []
    prepare = ImageFile.load_prepare

    def watch(image: ImageFile) -> None:
        sizes.append(image.size)
        prepare(image)

    monkeypatch.setattr(ImageFile, "load_prepare", watch)
    return sizes


async def test_a_12_megapixel_jpeg_is_decoded_in_full_only_for_a_region(decoded):
    async def script(peer: Peer) -> None:
        await peer.greet(view_width=336, view_height=336, rows=24, columns=24)
        for _ in range(2):
            ask = await peer.next_ask()
            await peer.answer(ask.id, "sure")
        ask = await peer.next_ask()
        peer.session.request_region(
            request(ask.id, index=300, side_px=336, target_width=336, target_height=336)
        )
        assert isinstance(await peer.next(), Region)
        await peer.answer(ask.id, "second", Stage.SECOND)
        ask = await peer.next_ask()
        peer.session.request_region(request(ask.id, index=0, side_px=4000, columns=24, rows=24))
        assert isinstance(await peer.next(), Decline)
        await peer.answer(ask.id, "first")
        await peer.socket.wait_closed()

    large = saved(photo(4000, 3000), "JPEG", quality=90)
    decoded.clear()
    async with scripted(script) as server:
        policy = PrivacyPolicy({"default": CameraPolicy(max_region_share=0.5)})
        async with EdgeClient(server.url, policy=policy) as client:
            await client.ask(large, "why?")
            assert decoded == [(1000, 750)]
            await client.ask(large, "and?")  # the server has the view
            assert decoded == [(1000, 750)]
            answer = await client.ask(large, "and there?")
            assert answer.refined
            ((width, height),) = decoded[1:]
            assert width == 4000
            assert answer.box is not None
            assert answer.box.bottom < height < answer.box.bottom + 128
            await client.ask(large, "and everywhere?")  # declined before anything is decoded
            assert len(decoded) == 2
