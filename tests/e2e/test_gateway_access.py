"""Access to the gateway, its page's relay, and what a privacy policy keeps on the device."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trustme
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge_client.client import EdgeClient
from edge_client.gateway import GatewayConfig
from edge_client.privacy.audit_log import RegionLine, ViewLine, read_log
from server_plugin.backends.fake import FakeBackend
from server_plugin.service.runner import running as serving
from tests.e2e.common import HASTY, SURE, UNSURE, check, photo
from tests.e2e.gateways import MODEL, data_url, deployed, gateway, running, sdk, user_message
from tests.support.patience import PATIENCE_S
from tests.support.wire import service
from vlm_collab.errors import AuthenticationError, CollabError, ConfigError
from vlm_collab.page import INDEX, TOKEN_SUBPROTOCOL, page_file
from vlm_collab.protocol.messages import SUBPROTOCOL


def root(base: str) -> str:
    return base.removesuffix("/v1")


async def status(deployment: Any, path: str = "/models", **headers: str) -> int:
    return (await deployment.http.get(path, headers=headers)).status_code


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "0.0.0.0"},
        {"host": "192.168.0.1"},
        {"host": "gateway.example"},
        {"port": 70000},
        {"deadline_s": 0},
        {"api_key": ""},
        {"api_key": "two words"},
        {"api_key": "schlüssel"},
        {"origins": frozenset({"*"})},
    ],
)
def test_unsafe_or_invalid_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        GatewayConfig(**wrong)
    GatewayConfig(host="0.0.0.0", api_key="key")
    GatewayConfig(host="0.0.0.0", allow_anonymous=True)


async def test_requests_need_the_api_key():
    async with deployed(api_key="right") as deployment:
        assert await status(deployment) == 401
        assert await status(deployment, Authorization="Bearer wrong") == 401
        assert await status(deployment, Authorization="Basic right") == 401
        assert await status(deployment, Authorization="Bearer right") == 200
        # With a key, every name of this machine is allowed.
        assert await status(deployment, Authorization="Bearer right", Host="camera.lan") == 200
        with pytest.raises(openai.AuthenticationError) as caught:
            await deployment.client.models.list()
        assert caught.value.code == "invalid_api_key"
        async with sdk(deployment.base, api_key="right") as client:
            reply = await client.chat.completions.create(
                model=MODEL, messages=[user_message(SURE, photo(1))]
            )
            assert reply.choices
        assert (await deployment.http.get(f"{root(deployment.base)}/healthz")).status_code == 200


async def test_foreign_host_names_are_refused():
    async with deployed() as deployment:
        for host in ("evil.example", "evil.example:8766", "localhost.evil.example", ""):
            assert await status(deployment, Host=host) == 403, host
        for host in (
            "localhost",
            "localhost:1",
            "127.0.0.1",
            "127.0.0.9:8766",
            "[::1]:5",
            "10.0.0.1",
        ):
            assert await status(deployment, Host=host) == 200, host


async def test_only_listed_origins_may_use_the_gateway():
    async with deployed(origins=frozenset({"https://mine.example"})) as deployment:
        refused = await deployment.http.get("/models", headers={"Origin": "https://evil.example"})
        assert refused.status_code == 403
        assert "--origin https://evil.example" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers
        for origin in ("null", "http://[", "https://mine.example.evil.example"):
            assert await status(deployment, Origin=origin) == 403
        allowed = await deployment.http.get("/models", headers={"Origin": "https://mine.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://mine.example"
        preflight = {
            "Origin": "https://mine.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        }
        assert (
            await deployment.http.options("/chat/completions", headers=preflight)
        ).status_code == 200
        # The gateway's own page.
        assert await status(deployment, Origin=root(deployment.base)) == 200


async def test_without_origins_there_are_no_cors_headers():
    async with deployed() as deployment:
        answer = await deployment.http.get("/models", headers={"Origin": root(deployment.base)})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert (await deployment.http.options("/models", headers=preflight)).status_code in (
            403,
            405,
        )


async def test_the_page_is_served_with_its_headers():
    async with deployed() as deployment:
        page = await deployment.http.get(root(deployment.base) + "/")
        file = page_file(INDEX)
        assert file is not None
        assert page.content == file.content
        assert "default-src 'none'" in page.headers["content-security-policy"]
        again = await deployment.http.get(
            root(deployment.base) + "/", headers={"If-None-Match": file.etag}
        )
        assert again.status_code == 304
        assert (
            await deployment.http.get(root(deployment.base) + "/page/main.js")
        ).status_code == 200
        assert (
            await deployment.http.get(root(deployment.base) + "/page/../cli.py")
        ).status_code == 404
        access = await deployment.http.post(root(deployment.base) + "/page/access")
        assert access.status_code == 204
        deployment.proxy.refusing = True
        deployment.proxy.cut()


def relay_of(base: str) -> str:
    return root(base).replace("http", "ws")


async def test_the_pages_frames_are_relayed_with_the_gateways_own_token():
    async with serving(service(FakeBackend(), token="upstream")) as url:
        async with running(gateway(url, token="upstream")) as base:
            async with EdgeClient(relay_of(base), retry=HASTY) as page:
                check(await page.ask(photo(1), UNSURE), photo(1), UNSURE)
                check(await page.ask(photo(1), SURE), photo(1), SURE)
        async with running(gateway(url, token="wrong")) as base:
            with pytest.raises(CollabError, match="502"):
                async with EdgeClient(relay_of(base), retry=HASTY):
                    pass


async def test_the_relay_has_the_access_rules_of_the_api():
    async with deployed(api_key="right") as deployment:
        with pytest.raises(AuthenticationError):
            async with EdgeClient(relay_of(deployment.base), retry=HASTY):
                pass
        async with EdgeClient(relay_of(deployment.base), token="right", retry=HASTY) as page:
            check(await page.ask(photo(1), SURE), photo(1), SURE)
        # As the page sends it: "right" in base64url.
        offered = [SUBPROTOCOL, f"{TOKEN_SUBPROTOCOL}cmlnaHQ"]
        async with connect(
            f"{relay_of(deployment.base)}/v1/collab", subprotocols=offered
        ) as socket:  # type: ignore[arg-type]
            assert socket.subprotocol == SUBPROTOCOL
    async with deployed() as deployment:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            with pytest.raises(InvalidStatus) as caught:
                await connect(
                    f"{relay_of(deployment.base)}/v1/collab",
                    subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                    additional_headers=headers,
                )
            assert caught.value.response.status_code in (400, 403)


async def test_the_relay_ends_when_server_or_page_disconnects():
    async with deployed(limits={"max_relays": 1}) as deployment:
        page = EdgeClient(relay_of(deployment.base), retry=HASTY)
        await page.connect()
        with pytest.raises(CollabError, match="503"):
            async with EdgeClient(relay_of(deployment.base), retry=HASTY):
                pass
        deployment.proxy.cut()
        # A page reconnects by itself.
        check(await page.ask(photo(2), UNSURE), photo(2), UNSURE)
        await page.close()
        async with asyncio.timeout(PATIENCE_S):
            while deployment.gateway._page._relays:
                await asyncio.sleep(0.005)


POLICY = """
cameras:
  default:
    max_region_share: 0.000001
  door:
    hide:
      - {px: [0, 0, 240, 360], of: [480, 360]}
  night:
    quiet_hours: ["00:00-12:00", "12:00-24:00"]
"""


async def test_policy_and_audit_log_apply_to_all_requests(tmp_path: Path):
    policy, audit = tmp_path / "policy.yaml", tmp_path / "audit.jsonl"
    policy.write_text(POLICY)
    async with deployed(policy=policy, camera="door", audit=audit) as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL,
            messages=[user_message(UNSURE, photo(1))],
            extra_body={"vlm_collab": {"retransmit": "always"}},
        )
        assert reply.choices
        off = await deployment.http.get(root(deployment.base) + "/")
        assert off.status_code == 403
        assert "\n" not in off.text
        assert "privacy policy" in off.text
        assert (
            await deployment.http.post(root(deployment.base) + "/page/access")
        ).status_code == 403
        with pytest.raises(AuthenticationError):
            async with EdgeClient(relay_of(deployment.base), retry=HASTY):
                pass
    view, *regions = read_log(audit).images
    assert isinstance(view, ViewLine)
    assert (view.camera, view.question) == ("door", UNSURE)
    assert view.hidden
    assert all(isinstance(region, RegionLine) for region in regions)
    assert reply.vlm_collab["region_bytes"] == sum(region.bytes for region in regions)


PICTURE = data_url(photo(1))
ESCAPED = json.dumps([PICTURE]).replace("/", "\\/")  # as PHP writes it
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat_body(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SURE, **message}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat_body(images=[PICTURE]), "messages[0].images"),
        (chat_body(content=user_message(SURE, photo(1))["content"][1]), "messages[0].content"),
        (chat_body(content=f"{SURE} {PICTURE}"), "messages[0].content"),
        (chat_body(content=[SURE, f"![]({PICTURE})"]), "messages[0].content[1]"),
        (
            chat_body(content=[{"type": "text", "text": PICTURE[23:]}]),
            "messages[0].content[0].text",
        ),
        (chat_body(tool_calls=[{"image": PICTURE}]), "messages[0].tool_calls[0].image"),
        ({**chat_body(), "cache_prompt": PICTURE}, "cache_prompt"),
        (
            chat_body(tool_calls=[{**CALL, "function": {"name": "f", "arguments": PICTURE}}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (chat_body(role="tool", tool_call_id="1", content=ESCAPED), "messages[0].content"),
        ({**chat_body(), "images": [PICTURE]}, "images"),
        ({**chat_body(), "attachments": [{"name": "a.jpg", "data": PICTURE[23:]}]}, "attachments"),
        ({**chat_body(), "user": PICTURE}, "user"),
        ({**chat_body(), "metadata": {"snapshot": PICTURE}}, "metadata.snapshot"),
        # Besides a picture that is sent as a view.
        ({"messages": [user_message(f"{SURE} {PICTURE}", photo(2))]}, "messages"),
    ],
)
async def test_a_picture_does_not_leave_as_text(tmp_path: Path, body: dict[str, Any], param: str):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    async with deployed(policy=policy) as deployment:
        for stream in (False, True):
            answer = await deployment.http.post(
                "/chat/completions", json={"model": MODEL, "stream": stream, **body}
            )
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param
        assert not deployment.proxy.connections


@pytest.mark.parametrize(
    "body",
    [
        {"input": f"{SURE} {PICTURE}"},
        {"input": SURE, "instructions": PICTURE},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": PICTURE[23:]}]}]},
    ],
)
async def test_a_picture_does_not_leave_as_the_text_of_a_response(body: dict[str, Any]):
    async with deployed() as deployment:
        answer = await deployment.http.post("/responses", json={"model": MODEL, **body})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "input"
        assert not deployment.proxy.connections


async def test_a_region_that_may_not_leave_is_declined(tmp_path: Path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    async with deployed(policy=policy) as deployment:
        reply = await deployment.client.chat.completions.create(
            model=MODEL, messages=[user_message(UNSURE, photo(1))]
        )
        assert reply.vlm_collab["fallback"] == "declined"
        assert reply.choices[0].message.content.startswith("first ")


async def test_in_quiet_hours_nothing_leaves(tmp_path: Path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    async with deployed(policy=policy, camera="night") as deployment:
        for content in ([user_message(SURE, photo(1))], [{"role": "user", "content": "hello"}]):
            with pytest.raises(openai.PermissionDeniedError) as caught:
                await deployment.client.chat.completions.create(model=MODEL, messages=content)
            assert caught.value.code == "privacy_policy"
        with pytest.raises(openai.PermissionDeniedError):
            await deployment.client.responses.create(model=MODEL, input="hello")


async def test_pictures_are_fetched_only_from_allowed_hosts(tmp_path: Path):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + photo(4))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        messages = [user_message(SURE, f"http://{host}/a.jpg")]
        async with deployed() as deployment:
            with pytest.raises(openai.BadRequestError, match=f"--allow-host {host}") as caught:
                await deployment.client.chat.completions.create(model=MODEL, messages=messages)
            assert caught.value.param == "messages[0].content[1].image_url.url"
        async with deployed(fetch_hosts=frozenset({host})) as deployment:
            reply = await deployment.client.chat.completions.create(model=MODEL, messages=messages)
            assert reply.vlm_collab["original_bytes"] == len(photo(4))


async def test_a_client_needs_only_plain_http(tmp_path: Path):
    """A request by a client without the SDK, such as curl."""
    async with deployed() as deployment, httpx.AsyncClient(verify=False, trust_env=False) as http:
        answer = await http.post(
            f"{deployment.base}/chat/completions",
            json={"messages": [user_message(SURE, photo(1))], "stream": True},
        )
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_the_gateway_checks_the_servers_certificate(tmp_path: Path):
    authority = trustme.CA()
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    behind = service(FakeBackend(), tls_cert=files["cert"], tls_key=files["key"])
    async with serving(behind) as url:
        assert url.startswith("wss:")
        async with running(gateway(url, ca_file=files["ca"])) as base, sdk(base) as client:
            for content in ([user_message(SURE, photo(1))], [{"role": "user", "content": "hello"}]):
                reply = await client.chat.completions.create(model=MODEL, messages=content)
                assert reply.choices[0].message.content
        async with running(gateway(url)) as base, sdk(base) as client:
            with pytest.raises(openai.InternalServerError, match="not trusted"):
                await client.models.list()
