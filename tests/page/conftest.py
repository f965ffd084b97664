"""One browser and one tab for all tests of a file; each test opens the page of its own server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.support.browser import Visitor, launched, tab_of


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with launched() as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(browser: Browser) -> AsyncIterator[Page]:
    """A tab that all tests share; a fresh one takes a second longer.

    Each test's server has its own port and so its own origin, so no state is left for the next.
    """
    async with tab_of(browser, viewport={"width": 1280, "height": 860}) as page:
        yield page


@pytest_asyncio.fixture(loop_scope="module")
async def visitor(tab: Page) -> AsyncIterator[Visitor]:
    visitor = Visitor(tab)
    with visitor.watching():
        yield visitor
        await tab.goto("about:blank")
