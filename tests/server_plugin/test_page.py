"""The page as the service serves it: files, headers, and who may connect from it."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import InvalidStatus

from server_plugin.service.config import ENDPOINT
from server_plugin.service.runner import running
from tests.support.wire import SURE, edge, http, picture, service
from vlm_collab.page import HEADERS, INDEX, TOKEN_SUBPROTOCOL, page_file, page_paths
from vlm_collab.protocol.messages import SUBPROTOCOL, Answer

RIGHT = f"{TOKEN_SUBPROTOCOL}czNjcmV0"  # s3cret
WRONG = f"{TOKEN_SUBPROTOCOL}czNjcmV1"


async def refused(url: str, **options) -> int:
    with pytest.raises(InvalidStatus) as caught:
        async with edge(url, **options):
            pass
    return caught.value.response.status_code


async def test_every_file_is_served_with_its_type_and_the_headers():
    async with running(service(token="s3cret")) as url, httpx.AsyncClient() as web:
        for path in page_paths():
            where = "/" if path == INDEX else f"/{path}"
            response = await web.get(http(url) + where)
            file = page_file(path)
            assert file is not None
            assert response.status_code == 200
            assert response.content == file.content
            assert response.headers["content-type"] == file.media_type
            assert {name: response.headers[name] for name in HEADERS} == dict(HEADERS)


async def test_an_unchanged_file_is_not_sent_again():
    async with running(service()) as url, httpx.AsyncClient() as web:
        first = await web.get(http(url) + "/page/main.js")
        tag = {"If-None-Match": first.headers["etag"]}
        again = await web.get(http(url) + "/page/main.js", headers=tag)
        assert (again.status_code, again.content) == (304, b"")
        other = await web.get(http(url) + "/page/link.js", headers=tag)
        assert other.status_code == 200


async def test_nothing_else_is_served():
    async with running(service()) as url, httpx.AsyncClient() as web:
        for path in ("/page/", "/page/../__init__.py", "/page/%2e%2e/__init__.py",
                     "/page/vendor/README.md", "/page//etc/passwd", "/index.html"):  # fmt: skip
            assert (await web.get(http(url) + path)).status_code == 404
        assert (await web.post(http(url) + "/")).status_code == 405


def test_the_socket_stays_the_first_route_and_the_rest_can_be_mounted_below_it():
    first, *others = service().routes()
    assert isinstance(first, WebSocketRoute)
    assert first.path == ENDPOINT
    app = Starlette(routes=[first, Mount(ENDPOINT, routes=others)])
    assert app.url_path_for("_file") == f"{ENDPOINT}/"


# ---- the token -------------------------------------------------------------------------------


async def test_a_page_carries_its_token_as_a_subprotocol():
    async with running(service(token="s3cret")) as url:
        for offered in ([SUBPROTOCOL, RIGHT], [RIGHT, SUBPROTOCOL]):
            async with edge(url, subprotocols=offered) as client:
                assert client.websocket.subprotocol == SUBPROTOCOL  # without the token
                await client.ask(SURE, picture())
                assert isinstance(await client.next(), Answer)


async def test_a_wrong_or_broken_token_is_refused():
    async with running(service(token="s3cret")) as url:
        for offered in (
            WRONG,
            TOKEN_SUBPROTOCOL,
            f"{TOKEN_SUBPROTOCOL}A",
            f"{TOKEN_SUBPROTOCOL}_w",
        ):
            assert await refused(url, subprotocols=[SUBPROTOCOL, offered]) == 401
        assert await refused(f"{url}?token=s3cret") == 401
        both = {"subprotocols": [SUBPROTOCOL, RIGHT]}
        wrong = {"Authorization": "Bearer wrong"}
        assert await refused(url, additional_headers=wrong, **both) == 401


async def test_a_token_alone_is_no_subprotocol():
    async with running(service(token="s3cret")) as url:
        assert await refused(url, subprotocols=[RIGHT]) == 400


async def test_an_empty_token_opens_nothing():
    async with running(service(token="s3cret")) as url, httpx.AsyncClient() as web:
        for value in ("Bearer", "bearer", ""):
            response = await web.post(http(url) + "/page/access", headers={"Authorization": value})
            assert response.status_code == 401


# ---- origins ---------------------------------------------------------------------------------


async def test_the_page_learns_why_it_may_not_connect():
    mine = service(token="s3cret", origins=frozenset({"https://camera.example"}))
    async with running(mine) as url, httpx.AsyncClient() as web:
        where = http(url) + "/page/access"
        bearer = {"Authorization": "Bearer s3cret"}
        assert (await web.get(where, headers=bearer)).status_code == 404  # it is no file
        response = await web.post(where)
        assert response.status_code == 401
        response = await web.post(where, headers={**bearer, "Origin": "https://evil.example"})
        assert response.status_code == 403
        assert "--origin https://evil.example" in response.text
        assert response.text.count("\n") == 0
        # No other page may read any of this.
        assert not any(name.startswith("access-control") for name in response.headers)
        response = await web.post(where, headers={**bearer, "Origin": "https://camera.example"})
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["access-control-allow-origin"] == "https://camera.example"
        mine.state.draining = True
        response = await web.post(where, headers=bearer)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_a_rebound_name_may_not_connect_unless_it_has_the_token():
    """DNS rebinding: an attacker's host name points at this machine, so that the attacker's page
    and this server seem to have one origin. The attacker does not know the token."""
    async with running(service()) as url:
        port = urlsplit(url).port
        named = {"origin": f"http://rebound.example:{port}", "host": "127.0.0.1", "port": port}
        assert await refused(f"ws://rebound.example:{port}{ENDPOINT}", **named) == 403
    async with running(service(token="s3cret")) as url:
        port = urlsplit(url).port
        named = {"origin": f"http://camera.lan:{port}", "host": "127.0.0.1", "port": port}
        url = f"ws://camera.lan:{port}{ENDPOINT}"
        assert await refused(url, **named) == 401
        async with edge(url, subprotocols=[SUBPROTOCOL, RIGHT], **named) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)


async def test_a_token_does_not_let_other_pages_in():
    async with running(service(token="s3cret")) as url:
        for origin in ("https://evil.example", "null", f"ftp://{urlsplit(url).netloc}"):
            both = {"subprotocols": [SUBPROTOCOL, RIGHT], "origin": origin}
            assert await refused(url, **both) == 403
