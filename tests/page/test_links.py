"""The page with a lost server, a required token, or a refused origin."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser

from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, Script
from server_plugin.engines.two_stage import Engine
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig, ServiceLimits
from server_plugin.service.runner import running
from tests.e2e.common import SURE, UNSURE, photo, slow
from tests.support.browser import Visitor, launched, page_of, visiting
from tests.support.patience import PATIENCE_S
from tests.support.proxy import Proxy, What, Where
from tests.support.wire import http, service
from vlm_collab.geometry import Size
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.protocol.messages import Answer, Ask, Hello, Region, RegionRequest, Welcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHOTO = photo(1)


async def test_questions_wait_while_the_server_is_away(visitor: Visitor):
    """The next server answers them; it gets the view first, since it has none."""
    async with running(service()) as url, Proxy(url) as proxy:
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        await visitor.ask(SURE, "sure")
        proxy.refusing = True
        proxy.cut()
        status = await visitor.status("lost")
        assert "Trying again" in status
        card = await visitor.ask(UNSURE)
        assert "Waiting for the server" in await card.note()
        await visitor.screenshot("server-gone")
        async with running(service()) as other:
            proxy.retarget(other)
            proxy.refusing = False
            await card.ends("refined")
            await visitor.status("open")
            asks = visitor.sent(Ask)
            assert asks[-1].view is not None
            assert asks[-1].view_id == asks[0].view_id
            assert await visitor.meter("sent") == visitor.bytes_up


async def test_the_view_is_not_sent_again_to_a_resumed_session(visitor: Visitor):
    async with running(service()) as url, Proxy(url) as proxy:
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        await visitor.ask(SURE, "sure")
        proxy.cut()
        await visitor.ask(UNSURE, "refined")
        welcomes = visitor.came(Welcome)
        assert welcomes[-1].session == welcomes[0].session == visitor.sent(Hello)[-1].resume
        assert [ask.view is None for ask in visitor.sent(Ask)] == [False, True]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Ask, Where.BEFORE),
        (Ask, Where.WITHIN),
        (Ask, Where.AFTER),
        (RegionRequest, Where.AFTER),
        (Region, Where.WITHIN),
        (Region, Where.AFTER),
        (Answer, Where.BEFORE),
    ],
)
async def test_a_cut_in_any_stage_loses_no_question(visitor: Visitor, kind: type, where: Where):
    async with running(service()) as url, Proxy(url) as proxy:
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        cut = proxy.rule(kind, where, What.CUT)
        card = await visitor.ask(UNSURE, "refined")
        assert cut.fired.is_set()
        assert (await card.answer()).startswith("second ")
        assert len(visitor.came(Welcome)) == 2
        # All attempts count, including lost ones.
        assert await card.bytes_up() > visitor.came(Answer)[-1].usage.bytes_up
        assert await visitor.meter("sent") == visitor.bytes_up


async def test_a_server_lost_for_good_in_the_second_stage_leaves_the_first_answer(
    browser: Browser,
):
    async with running(service()) as url, Proxy(url) as proxy, visiting(browser) as visitor:
        await visitor.page.clock.install()
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        proxy.rule(RegionRequest, Where.AFTER, What.CUT)
        stalled = proxy.rule(Ask, Where.AFTER, What.STALL, nth=2)
        card = await visitor.ask(UNSURE)
        await asyncio.wait_for(stalled.fired.wait(), PATIENCE_S)
        # The region's deadline plus the grace period.
        await visitor.page.clock.fast_forward(9_900)
        assert await card.locator.get_attribute("data-state") == "asking"
        await visitor.page.clock.fast_forward(5_200)
        await card.ends("first")
        assert (await card.answer()).startswith("first ")
        assert "the connection was lost" in await card.note()


async def test_a_question_moves_to_the_next_server_at_a_shutdown(visitor: Visitor):
    backend = slow(0.2)
    mine = service(backend, limits={"shutdown_grace_s": 0.01})
    async with running(mine) as url, Proxy(url) as proxy:
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        card = await visitor.ask(SURE)
        await proxy.until_passed(Ask)
        async with running(service()) as other:
            proxy.retarget(other)
            await mine.drain()
            await card.ends("sure")


async def test_a_full_server_is_asked_again(visitor: Visitor):
    limits = {"max_questions": 1}
    async with running(service(slow(0.3), limits=limits)) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        cards = [await visitor.ask(SURE), await visitor.ask("what else?")]
        for card in cards:
            await card.ends("sure")
        assert len(visitor.sent(Ask)) > 2


async def test_a_view_that_the_server_lost_is_sent_again(visitor: Visitor):
    mine = service()
    async with running(mine) as url:
        await visitor.open(url)
        await visitor.choose(PHOTO)
        await visitor.ask(SURE, "sure")
        for client in list(mine.state.views._sessions.values()):
            client.views.clear()
        await visitor.ask("and now?", "sure")
        assert [ask.view is None for ask in visitor.sent(Ask)] == [False, True, False]


async def test_a_question_outlasts_many_lost_links(browser: Browser):
    """It is retried for a minute, no faster than the pauses allow."""
    async with running(service()) as url, Proxy(url) as proxy, visiting(browser) as visitor:
        await visitor.page.clock.install()
        await visitor.open(proxy.url)
        await visitor.choose(PHOTO)
        cuts = [proxy.rule(Ask, Where.AFTER, What.CUT, nth=number) for number in range(1, 9)]
        card = await visitor.ask(SURE)
        for number, cut in enumerate(cuts, start=1):
            await asyncio.wait_for(cut.fired.wait(), PATIENCE_S)
            await visitor.status("lost")
            assert len(visitor.sent(Ask)) == number
            await visitor.page.clock.fast_forward(5_000)
        await card.ends("sure")
        assert len(visitor.sent(Ask)) == 9


async def test_a_question_that_crashes_the_server_is_given_up(browser: Browser):
    def play(question: str, view: str, region: str) -> Script:
        for connection in list(mine._connections):
            if "deadly" in question:
                connection.abort()
        return Script("first", "second")

    mine = service(FakeBackend(play=play))
    async with running(mine) as url, visiting(browser) as visitor:
        await visitor.page.clock.install()
        await visitor.open(url)
        await visitor.choose(PHOTO)
        card = await visitor.ask("a deadly question")
        while await card.locator.get_attribute("data-state") == "asking":
            await visitor.page.clock.fast_forward(2_000)  # the pauses between attempts
        await card.ends("failed")
        assert re.search(r"Given up after \d+ lost connections", await card.note())
        assert 6 < len(visitor.sent(Ask)) < 60
        again = card.locator.get_by_role("button", name="Ask again")
        assert await again.is_visible()
        await visitor.ask(SURE, "sure")


# ---- tokens ----------------------------------------------------------------------------------


async def test_the_page_asks_for_the_token(visitor: Visitor):
    async with running(service(token="s3cret ✓".encode().decode())) as url:
        await visitor.open(url, connected=False)
        assert "asks for a token" in await visitor.status("token")
        field = visitor.page.get_by_label("Access token")
        assert await field.evaluate("(field) => field === document.activeElement")
        # A question can already be asked; it waits.
        await visitor.choose(PHOTO)
        card = await visitor.ask(UNSURE)
        await field.fill("wrong")
        await field.press("Enter")
        await visitor.page.wait_for_selector("#status:has-text('not accepted')")
        await field.fill("wróng ✓")
        await field.press("Enter")
        await visitor.page.wait_for_selector("#status[data-kind=token]")
        assert await visitor.page.evaluate("sessionStorage.length") == 0
        await visitor.screenshot("token")
        await field.fill("s3cret ✓")
        await field.press("Enter")
        await visitor.status("open")
        assert not await field.is_visible()
        await card.ends("refined")
        # The token is kept for this tab only, and in no URL.
        assert await visitor.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert not any("s3cret" in address or "czNj" in address for address in visitor.urls)
        await visitor.page.reload()
        await visitor.status("open")
        assert not await field.is_visible()


async def test_a_server_that_requires_too_large_views_is_refused(visitor: Visitor):
    info = replace(DEFAULT_INFO, view=Size(2000, 1500), view_bytes=2000 * 1500 * 3)
    async with running(service(FakeBackend(info=info))) as url:
        await visitor.page.goto(page_of(url))
        status = await visitor.status("refused")
        assert "views of 2000 × 1500 pixels" in status
        await visitor.choose(PHOTO)
        card = await visitor.ask(SURE, "failed")
        assert status in await card.note()
        assert visitor.sent(Ask) == []


# ---- origins ---------------------------------------------------------------------------------

ELSEWHERE = "--host-resolver-rules=MAP camera.example 127.0.0.1"


@asynccontextmanager
async def renaming(url: str) -> AsyncIterator[int]:
    """A proxy that replaces the browser's `Host` by the service's address; yields its port."""
    at = urlsplit(url)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(re.sub(rb"Host: [^\r]*", b"Host: 127.0.0.1", data) if up else data)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(at.hostname, at.port)
        await asyncio.gather(pipe(reader, far_writer, True), pipe(far_reader, writer, False))

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        server.close()


async def test_a_page_beyond_localhost_needs_its_origin_listed_or_the_token():
    async with launched(ELSEWHERE) as browser:
        async with running(service()) as url, visiting(browser) as visitor:
            answer = await visitor.page.goto(f"http://camera.example:{urlsplit(url).port}/")
            assert answer is not None
            assert answer.status == 403
            assert "--host-name camera.example" in await answer.text()
        known = service(host_names=frozenset({"camera.example"}))
        async with running(known) as url, visiting(browser) as visitor:
            await visitor.page.goto(f"http://camera.example:{urlsplit(url).port}/")
            await visitor.status("open")
        async with running(service()) as url, renaming(url) as port, visiting(browser) as visitor:
            origin = f"http://camera.example:{port}"
            await visitor.page.goto(f"{origin}/")
            status = await visitor.status("refused")
            assert f"--origin {origin}" in status
            assert "\n" not in status
            await visitor.choose(PHOTO)
            card = await visitor.ask(SURE, "failed")
            assert f"--origin {origin}" in await card.note()
            await visitor.screenshot("refused")
            assert visitor.came(Welcome) == []
        async with running(service(token="s3cret")) as url, visiting(browser) as visitor:
            await visitor.page.goto(f"http://camera.example:{urlsplit(url).port}/")
            await visitor.status("token")
            await visitor.page.get_by_label("Access token").fill("s3cret")
            await visitor.page.get_by_role("button", name="Connect").click()
            await visitor.status("open")
        sock_port = await _free_port()
        listed = frozenset({f"http://camera.example:{sock_port}"})
        async with running(_at(sock_port, origins=listed)), visiting(browser) as visitor:
            await visitor.page.goto(f"http://camera.example:{sock_port}/")
            await visitor.status("open")
            # Beyond localhost, browsers give no camera without TLS, so none is offered.
            assert not await visitor.page.get_by_role("button", name="Take a picture").is_visible()


async def test_another_site_cannot_use_a_server_on_this_machine(browser: Browser):
    """Neither the WebSocket, nor the server's status, nor the page in a frame."""
    async with running(service()) as victim, running(service()) as other:
        async with visiting(browser) as visitor:
            await visitor.page.goto(page_of(other))
            await visitor.status("open")
            # The other page's own content policy would stop it; a hostile page has none.
            context = await browser.new_context(bypass_csp=True)
            page = await context.new_page()
            await page.goto(page_of(other))
            opened = await page.evaluate(
                """(url) => new Promise((done) => {
                    const socket = new WebSocket(url, "vlm-collab.v1");
                    socket.onopen = () => done(true);
                    socket.onerror = () => done(false);
                })""",
                victim,
            )
            assert opened is False
            read = "(url) => fetch(url, { method: 'POST' }).then(() => true, () => false)"
            assert await page.evaluate(read, http(victim) + "/page/access") is False
            framed = await page.evaluate(
                """(url) => new Promise((done) => {
                    const frame = document.createElement("iframe");
                    frame.src = url;
                    frame.onload = () => done(frame.contentDocument === null);
                    document.body.append(frame);
                })""",
                page_of(victim),
            )
            assert framed
            inside = next(frame for frame in page.frames if frame != page.main_frame)
            assert await inside.query_selector("#question") is None
            await context.close()


async def _free_port() -> int:
    """A free port that probably stays free."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


def _at(port: int, **config: object) -> Service:
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5)
    settings = ServiceConfig(port=port, limits=ServiceLimits(), **config)  # type: ignore[arg-type]
    return Service(Engine(backend=FakeBackend(), policy=policy), settings)
