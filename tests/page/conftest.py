"""One browser for all tests of a file; each test has a profile of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from playwright.async_api import Browser

from tests.support.browser import Visitor, launched, visiting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with launched() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def visitor(browser: Browser) -> AsyncIterator[Visitor]:
    async with visiting(browser, viewport={"width": 1280, "height": 860}) as visitor:
        yield visitor
