"""The gateway's page in a real browser: its frames are relayed to the server and back."""

from __future__ import annotations

import pytest

from server_plugin.backends.fake import FakeBackend
from tests.e2e.common import SURE, UNSURE, photo
from tests.e2e.gateways import deployed
from tests.support.browser import launched, visiting
from vlm_collab.protocol.messages import Ask, Region


@pytest.mark.parametrize("key", [None, "right"])
async def test_a_question_on_the_page_is_answered_through_the_gateway(key: str | None):
    async with (
        deployed(
            FakeBackend(), config={"token": "upstream"}, token="upstream", api_key=key
        ) as deployment,
        launched() as browser,
        visiting(browser) as visitor,
    ):
        await visitor.open(deployment.base.replace("http", "ws"), connected=key is None)
        if key is not None:
            await visitor.status("token")
            await visitor.page.get_by_label("Access token").fill(key)
            await visitor.page.get_by_label("Access token").press("Enter")
            await visitor.status("open")
        await visitor.choose(photo(1), "photo.jpg")
        card = await visitor.ask(UNSURE, "refined")
        assert (await card.answer()).startswith("second ")
        assert len(visitor.sent(Region)) == 1
        card = await visitor.ask(SURE, "sure")
        assert SURE in await card.answer()
        assert [ask.view is None for ask in visitor.sent(Ask)] == [False, True]
