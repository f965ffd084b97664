"""Pages of other origins that use a server's OpenAI API, in a real browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from playwright.async_api import Page

from server_plugin.service.runner import running
from tests.e2e.common import SURE, photo
from tests.e2e.gateways import MODEL, gateway, user_message
from tests.e2e.gateways import running as relaying
from tests.support.browser import launched
from tests.support.wire import http, service

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKING = """async ([url, key, body]) => {
  const headers = {"authorization": `Bearer ${key}`, "x-stainless-os": "any"};
  if (body) headers["content-type"] = "application/json";
  try {
    const answer = await fetch(url, {method: body ? "POST" : "GET", headers, body});
    return [answer.status, await answer.text(), answer.headers.get("www-authenticate")];
  } catch (error) {
    return [0, String(error), null];
  }
}"""


@asynccontextmanager
async def page_origin() -> AsyncIterator[str]:
    """Serve a page of another origin; yields the origin."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        text = b"<!doctype html><title>elsewhere</title>"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(text)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + text)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def fetched(tab: Page, url: str, key: str, body: str | None = None) -> Any:
    return await tab.evaluate(ASKING, [url, key, body])


async def test_only_listed_pages_read_answers_and_refusals(tab: Page):
    question = msgspec.json.encode(
        {"model": MODEL, "messages": [user_message(SURE, photo(1))]}
    ).decode()
    async with page_origin() as mine, page_origin() as other:
        origins = frozenset({mine})
        async with running(service(token="right", origins=origins)) as url:
            app = gateway(url, token="right", api_key="right", origins=origins)
            async with relaying(app) as base:
                for api in (f"{http(url)}/v1", base):
                    await tab.goto(mine)
                    status, text, _ = await fetched(
                        tab, f"{api}/chat/completions", "right", question
                    )
                    assert (status, SURE in text) == (200, True)
                    status, text, header = await fetched(tab, f"{api}/models", "wrong")
                    assert (status, header) == (401, "Bearer")
                    assert "invalid_api_key" in text
                    await tab.goto(other)
                    status, text, _ = await fetched(tab, f"{api}/models", "right")
                    assert (status, "TypeError" in text) == (0, True)
        await tab.goto("about:blank")


async def test_a_page_with_a_rebound_name_is_refused():
    """The page comes from the server's own address, so the browser sees the same origin."""
    async with launched("--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        tab = await browser.new_page()
        async with running(service()) as url, relaying(gateway(url)) as base:
            for root in (http(url), base.removesuffix("/v1")):
                renamed = root.replace("127.0.0.1", "evil.example")
                for path in ("/readyz", "/healthz", "/metrics", "/v1/models", "/", "/page/main.js"):
                    answer = await tab.goto(renamed + path)
                    assert answer is not None
                    assert answer.status == 403, renamed + path
                    assert MODEL not in await answer.text()
