"""The page in a real browser: launching a browser, and using the page as people do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, WebSocket, async_playwright

from tests.support.patience import PATIENCE_S
from vlm_collab.protocol.encoding import decode_down, decode_up, websocket_bytes
from vlm_collab.protocol.messages import AnyMessage

SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "screenshots"
REPLAY = Path(__file__).with_name("replay.mjs")
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",  # root in a container has none; all that is opened here is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
PATIENCE_MS = 1000 * PATIENCE_S


def executable() -> str:
    """Path of a browser on this machine. Without one the test is skipped, or fails in CI."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    reason = f"no Chromium on this machine (one of {', '.join(NAMES)}); `make browser` installs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@asynccontextmanager
async def launched(*flags: str) -> AsyncIterator[Browser]:
    """A headless Chromium."""
    path = executable()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Visitor:
    """A browser tab with the page, and a record of its network traffic.

    Attributes:
        page: Playwright's page, for actions without a method here.
        up, down: messages of all WebSockets, in order.
        bytes_up, bytes_down: of those messages, WebSocket headers included.
        sockets: WebSockets opened.
        urls: everything requested.
        complaints: errors of the page and violations of its policy; none are expected.
    """

    page: Page
    up: list[Any] = field(default_factory=list)
    down: list[Any] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    sockets: int = 0
    urls: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record traffic and errors, and check them at the end.

        No request may have gone to another host than the page's own, nothing may have broken
        the page's policy, and no error may have been left uncaught.
        """
        listeners: dict[Any, Any] = {
            "request": lambda request: self.urls.append(request.url),
            "websocket": self._socket,
            "pageerror": lambda error: self.complaints.append(str(error)),
            "console": self._console,
        }
        for event, listener in listeners.items():
            self.page.on(event, listener)
        try:
            yield
        finally:
            for event, listener in listeners.items():
                self.page.remove_listener(event, listener)
        addresses = [url for url in self.urls if not url.startswith(("blob:", "about:"))]
        assert len({urlsplit(url).netloc for url in addresses}) <= 1, addresses
        assert self.complaints == []

    def _socket(self, socket: WebSocket) -> None:
        self.sockets += 1
        self.urls.append(socket.url)
        socket.on("framesent", self._sent)
        socket.on("framereceived", self._received)

    def _sent(self, payload: bytes | str) -> None:
        assert isinstance(payload, bytes)
        self.up.append(decode_up(payload))
        self.bytes_up += websocket_bytes(len(payload), masked=True)

    def _received(self, payload: bytes | str) -> None:
        assert isinstance(payload, bytes)
        self.down.append(decode_down(payload))
        self.bytes_down += websocket_bytes(len(payload), masked=False)

    def _console(self, message: Any) -> None:
        # The browser itself reports failed connections there; every other error is a fault.
        network = re.search(r"WebSocket connection|Failed to load resource|ERR_", message.text)
        if message.type in ("error", "warning") and not network:
            self.complaints.append(message.text)

    def sent(self, kind: type[AnyMessage]) -> list[Any]:
        """Messages of a kind that the page sent."""
        return [message for message in self.up if type(message) is kind]

    def came(self, kind: type[AnyMessage]) -> list[Any]:
        """Messages of a kind that the page received."""
        return [message for message in self.down if type(message) is kind]

    async def open(self, url: str, *, connected: bool = True) -> None:
        """Open the page of the service at a WebSocket address."""
        await self.page.goto(page_of(url))
        if connected:
            await self.status("open")

    async def status(self, kind: str) -> str:
        """Wait for a state of the connection; return the page's text about it."""
        await self.page.wait_for_selector(f"#status[data-kind={kind}]")
        return await self.page.inner_text("#status")

    async def choose(self, data: bytes, name: str = "photo.jpg", type: str = "image/jpeg") -> None:
        """Choose a picture as with the file dialogue, and wait until the page shows it."""
        await self.page.set_input_files(
            "#file", {"name": name, "mimeType": type, "buffer": data}, timeout=PATIENCE_MS
        )
        await self.page.wait_for_selector(f"#caption:has-text('{name}')")
        await self.page.wait_for_selector("#stage:not([aria-busy])")

    async def ask(self, question: str, state: str | None = None) -> Card:
        """Ask with the keyboard; with a state, wait until the question ends in it."""
        before = await self.page.locator(".card").count()
        await self.page.fill("#question", question)
        await self.page.press("#question", "Enter")
        card = Card(self.page, before)
        await card.locator.wait_for()
        if state is not None:
            await card.ends(state)
        return card

    async def meter(self, name: str) -> int:
        """Bytes that the session's meter shows: `sent` or `whole`."""
        return int(await self.page.get_attribute(f"#{name}", "data-bytes") or -1)

    async def problem(self) -> str:
        """The line that reports a problem; waits for it."""
        line = self.page.locator("#problem:not(:empty)")
        await line.wait_for()
        text = await line.inner_text()
        assert "\n" not in text
        return text

    async def shows_box(self) -> dict[str, float]:
        """The box over the picture, in px of the original."""
        line = self.page.locator("#box-line")
        return {
            name: float(await line.get_attribute(name) or "nan")
            for name in ("x", "y", "width", "height")
        }

    async def screenshot(self, name: str, **options: Any) -> Path:
        """Save a picture of the page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        await self.page.screenshot(path=path, animations="disabled", **options)
        return path

    async def replay(self, sent: dict[str, Any]) -> Any:
        """Run `replay.mjs` in this page, with the modules that the server sent."""
        source = REPLAY.read_text().replace("export const replay =", "const replay =")
        function = f"(sent) => {{ {source}; return replay(sent).then(JSON.stringify); }}"
        base = page_of(self.page.url) + "page/"
        return json.loads(await self.page.evaluate(function, {"base": base, **sent}))


class Card:
    """One question on the page, by its number from the first."""

    def __init__(self, page: Page, number: int) -> None:
        self.locator = page.locator("#questions").locator(f".card:nth-last-child({number + 1})")
        self._page = page

    async def ends(self, state: str) -> None:
        """Wait until the question ends in this state: refined, sure, first or failed."""
        ended = self.locator.and_(self._page.locator(".card:not([data-state=asking])"))
        await ended.wait_for()
        assert await self.locator.get_attribute("data-state") == state, await self.text()

    async def text(self) -> str:
        """All its text."""
        return await self.locator.inner_text()

    async def answer(self) -> str:
        return await self.locator.locator(".answer").inner_text()

    async def note(self) -> str:
        return await self.locator.locator(".note").inner_text()

    async def bytes_up(self) -> int:
        return int(await self.locator.locator(".cost").get_attribute("data-bytes") or -1)


def page_of(url: str) -> str:
    """The page beside a WebSocket's address."""
    parts = urlsplit(url)
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    return f"{scheme}://{parts.netloc}/"


@asynccontextmanager
async def visiting(browser: Browser, **options: Any) -> AsyncIterator[Visitor]:
    """A visitor with a fresh browser profile."""
    async with tab_of(browser, **options) as page:
        visitor = Visitor(page)
        with visitor.watching():
            yield visitor


@asynccontextmanager
async def tab_of(browser: Browser, **options: Any) -> AsyncIterator[Page]:
    """A tab in a fresh profile, which reports violations of a page's policy."""
    context = await browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    try:
        await context.add_init_script(
            "addEventListener('securitypolicyviolation', "
            "(event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )
        yield await context.new_page()
    finally:
        await context.close()
