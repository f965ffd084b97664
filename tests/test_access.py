"""The access rules on every route of every server: `Host`, `Origin` and token."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tests.support.access_table import (
    FOREIGN_NAME,
    FOREIGN_PAGE,
    PAGE,
    TOKEN,
    WITH_TOKEN,
    ProbedRoute,
    page,
    probed_routes,
    servers,
    status_of,
)
from vlm_collab.errors import ConfigError
from vlm_collab.web.access import checked_names

COMMANDS = ("vlm-collab serve", "vlm-collab gateway", "vllm serve")
OPEN = ("/healthz", "/readyz", "/", "/page/{path}")
"""Routes that need no token, relative to where they are mounted."""
MINE = "https://mine.example"


def all_of(app: Starlette) -> list[ProbedRoute]:
    """Every route, and some paths without a route."""
    found = list(probed_routes(app.routes))
    below = "/collab" if ProbedRoute("GET", "/collab/healthz", "/collab/healthz") in found else ""
    none = [below + path for path in ("/nothing", "/v1", "/metrics/", "/page", "/page/access/")]
    return [*found, *(ProbedRoute("GET", path, path) for path in none)]


def local(app: Starlette) -> TestClient:
    """A client on the same machine."""
    return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)


@pytest.mark.parametrize("command", COMMANDS)
async def test_no_route_answers_to_a_foreign_host_name(command: str):
    app = servers(None)[command]
    for route in all_of(app):
        assert await status_of(app, route, FOREIGN_NAME) == 403, route


@pytest.mark.parametrize("command", COMMANDS)
async def test_no_route_answers_pages_of_other_origins(command: str):
    for token in (None, TOKEN):
        app = servers(token)[command]
        for route in probed_routes(app.routes):
            # Behind a proxy that changes `Host`, requests for the page's own files look like this.
            is_file = route.method == "GET" and route.template.endswith(("/", "/page/{path}"))
            refused = await status_of(app, route, {**FOREIGN_PAGE, **WITH_TOKEN}) == 403
            assert refused is not is_file, route


@pytest.mark.parametrize("command", COMMANDS)
async def test_all_routes_except_open_ones_require_the_token(command: str):
    app = servers(TOKEN)[command]
    for route in probed_routes(app.routes):
        is_open = route.method == "GET" and any(
            route.template.removeprefix(below) == path
            for path in OPEN
            for below in ("", "/collab", "/v1/collab")
        )
        for headers in ({}, {"Authorization": "Bearer wrong"}, FOREIGN_NAME):
            refused = await status_of(app, route, headers) == 401
            assert refused is not is_open, (route, headers)
        # With a token every name and every route is allowed.
        assert await status_of(app, route, {**WITH_TOKEN, **FOREIGN_NAME}) not in (401, 403), route


@pytest.mark.parametrize("command", COMMANDS[:2])
@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("localhost:1", True),
        ("LocalHost.", True),
        ("127.0.0.1", True),
        ("127.0.0.9:8766", True),
        ("[::1]:5", True),
        # Addresses cannot be re-bound: probes of a cluster, and clients in the same network.
        ("10.0.0.1", True),
        ("192.168.1.20:8766", True),
        ("[fe80::1]", True),
        ("camera.lan", True),
        ("Camera.LAN:8766", True),
        ("evil.example", False),
        ("evil.example:8766", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("sub.camera.lan", False),
        ("2130706433", False),
        ("0x7f.1", False),
        ("me@localhost", False),
        ("localhost/evil.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_without_a_token_only_own_host_names_are_accepted(command: str, host: str, known: bool):
    app = servers(None, host_names=frozenset({"camera.lan"}))[command]
    for path in ("/healthz", "/v1/nothing", "/"):
        assert (local(app).get(path, headers={"Host": host}).status_code == 403) is not known
    if known:  # a page served under such a name may ask
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert local(app).get("/v1/nothing", headers=headers).status_code == 404


def test_the_host_name_of_a_listed_origin_is_accepted():
    """A proxy may forward the browser's `Host`."""
    app = servers(None, origins=frozenset({f"{MINE}:8443"}))["vlm-collab serve"]
    for host in ("mine.example", "mine.example:8443", "MINE.example:1"):
        assert local(app).get("/readyz", headers={"Host": host}).status_code == 200
    assert local(app).get("/readyz", headers={"Host": "sub.mine.example"}).status_code == 403


async def test_a_request_without_a_host_header_is_allowed():
    """Probes that speak HTTP/1.0 send none."""
    statuses: list[int] = []

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/healthz",
        "query_string": b"",
        "headers": [],
    }
    await servers(None)["vlm-collab serve"](scope, receive, send)
    twice = {**scope, "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]}
    await servers(None)["vlm-collab serve"](twice, receive, send)
    # A page with a null origin does not match an empty `Host`.
    null_origin = {**scope, "headers": [(b"origin", b"null"), (b"host", b"")]}
    await servers(TOKEN)["vlm-collab serve"](null_origin, receive, send)
    assert statuses == [200, 403, 403]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_refusal_names_the_option_that_allows_the_request(command: str):
    app = servers(None)[command]
    below = "/collab" if command == "vllm serve" else ""
    named = local(app).get(f"{below}/readyz", headers=FOREIGN_NAME)
    assert "--host-name evil.example" in named.text
    paged = local(app).post(f"{below}/page/access", headers=FOREIGN_PAGE)
    assert "--origin https://evil.example" in paged.text
    long = local(app).get(f"{below}/readyz", headers={"Host": "a" * 5000})
    assert len(long.text) < 700
    if command == "vllm serve":
        assert '"host_names": ["evil.example"]' in named.text
        assert '"origins": ["https://evil.example"]' in paged.text
    else:
        body = local(app).get("/v1/models", headers=FOREIGN_NAME).json()
        assert body["error"]["code"] == "unknown_host"


@pytest.mark.parametrize("command", COMMANDS[:2])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_listed_origins_get_the_cors_headers_that_browsers_need(command: str, token: str | None):
    app = servers(token, origins=frozenset({MINE}))[command]
    preflight = {
        "Origin": MINE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    for path in ("/v1/chat/completions", "/v1/responses", "/healthz", "/v1/nothing"):
        response = local(app).options(path, headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == MINE
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "authorization" in response.headers["access-control-allow-headers"]
        assert response.headers["access-control-allow-private-network"] == "true"
        assert "access-control-allow-credentials" not in response.headers
    # Pages can read refusals as well, with all their headers.
    answers = [local(app).get("/v1/nothing", headers={"Origin": MINE})]
    answers.append(local(app).get("/v1/nothing", headers={"Origin": MINE, **WITH_TOKEN}))
    assert [each.status_code for each in answers] == [401 if token else 404, 404]
    for each in answers:
        assert each.headers["access-control-allow-origin"] == MINE
        assert each.headers["access-control-expose-headers"] == "*"
        assert each.headers["vary"] == "Origin"
    # Other origins are refused.
    for headers in (FOREIGN_PAGE, {"Origin": "null"}, {"Origin": f"{MINE}.evil.example"}):
        response = local(app).options("/v1/chat/completions", headers={**preflight, **headers})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_listed_host_names_are_checked_and_lowered():
    assert checked_names(frozenset({"Camera.lan", "gateway"})) == {"camera.lan", "gateway"}
    for wrong in ("camera.lan:8766", "http://camera.lan", "*", "*.lan", "", "a/b", "camera.lan."):
        with pytest.raises(ConfigError, match="--host-name"):
            checked_names(frozenset({wrong}))


async def test_the_access_table_in_the_docs_is_current():
    text = PAGE.read_text(encoding="utf-8")
    assert await page(text) == text, "run `python -m tests.support.access_table`"
