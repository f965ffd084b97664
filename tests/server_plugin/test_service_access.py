"""The service's access rules, metrics and logs."""

from __future__ import annotations

import json
import logging
import ssl
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from websockets.exceptions import InvalidStatus

from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend
from server_plugin.service.logs import JsonFormatter, PlainFormatter
from server_plugin.service.runner import running
from tests.support.wire import SURE, UNSURE, edge, http, picture, service, unsure
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Size
from vlm_collab.protocol.messages import (
    Answer,
)

# ---- access ----------------------------------------------------------------------------------


async def refused(url, **options) -> int:
    with pytest.raises(InvalidStatus) as caught:
        async with edge(url, **options):
            pass
    return caught.value.response.status_code


async def test_the_token_guards_questions_and_metrics_but_not_health():
    async with running(service(token="s3cret")) as url, httpx.AsyncClient() as web:
        for wrong in ("", "Bearer", "Bearer wrong", "Basic s3cret", "Bearer s3cret2"):
            assert await refused(url, additional_headers={"Authorization": wrong}) == 401
        async with edge(url, additional_headers={"Authorization": "Bearer s3cret"}) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)
        assert (await web.get(http(url) + "/metrics")).status_code == 401
        assert (await web.get(http(url) + "/healthz")).status_code == 200
        assert (await web.get(http(url) + "/readyz")).json()["ready"] is True


async def test_there_may_be_several_tokens():
    config = {"token": "one", "more_tokens": ("two", "three")}
    async with running(service(**config)) as url, httpx.AsyncClient() as web:
        for right in ("one", "two", "three"):
            headers = {"Authorization": f"Bearer {right}"}
            assert (await web.get(http(url) + "/metrics", headers=headers)).status_code == 200
        for wrong in ("four", "one,two", "onetwo"):
            headers = {"Authorization": f"Bearer {wrong}"}
            assert (await web.get(http(url) + "/metrics", headers=headers)).status_code == 401


async def test_pages_of_other_origins_may_not_connect():
    running_service = service(origins=frozenset({"https://camera.example"}))
    async with running(running_service) as url:
        host = urlsplit(url).netloc
        port = host.rpartition(":")[2]
        for origin in (
            "https://evil.example",
            "null",
            "http://[",
            "http://127.0.0.1:1",
            f"http://evil:{port}",
        ):
            assert await refused(url, origin=origin) == 403
        for origin in ("https://camera.example", f"http://{host}"):
            async with edge(url, origin=origin):
                pass


async def test_another_subprotocol_is_refused():
    async with running(service()) as url:
        assert await refused(url, subprotocols=["chat"]) == 400


async def test_connections_are_bounded():
    async with running(service(limits={"max_connections": 1})) as url, edge(url):
        assert await refused(url) == 503


def test_open_addresses_need_a_token():
    with pytest.raises(ConfigError, match="without a token"):
        service(host="0.0.0.0")
    service(host="0.0.0.0", token="t")
    service(host="0.0.0.0", allow_anonymous=True)


async def test_tls(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    async with running(service(**files)) as url:
        assert url.startswith("wss://")
        async with edge(url, ssl=context) as client:
            await client.ask(SURE, picture())
            assert isinstance(await client.next(), Answer)


# ---- metrics and logs ------------------------------------------------------------------------


async def test_metrics_count_questions_regions_and_bytes():
    running_service = service(limits={"region_deadline_s": 0.05})
    async with running(running_service) as url, edge(url) as client, httpx.AsyncClient() as web:
        await client.ask(SURE, picture())
        await client.next()
        id = await client.ask(UNSURE)
        await client.next()
        await client.region(id, picture(3))
        await client.next()
        await unsure(client)
        await client.next()
        await client.ask("", view_id=1)
        await client.next()
        text = (await web.get(http(url) + "/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(lines[f"vlm_collab_{name}"])

    assert value('questions_total{outcome="first"}') == 1
    assert value('questions_total{outcome="second"}') == 1
    assert value('questions_total{outcome="fallback_deadline"}') == 1
    assert value('questions_total{outcome="refused"}') == 1
    assert value('refusals_total{code="bad_question"}') == 1
    assert value("retransmissions_total") == 2
    assert value("first_uncertainty_count") == 3
    assert value('stage_seconds_count{stage="second"}') == 1
    assert value("connections") == 1
    assert value("views") == 1
    assert value("queue_depth") == 0
    for kind, direction in (("Ask", "up"), ("Region", "up"), ("RegionRequest", "down")):
        sent = client.session.traffic.total_bytes(direction, kind)
        assert value(f'bytes_total{{direction="{direction}",kind="{kind}"}}') == sent > 0


def test_a_client_s_name_cannot_break_its_log_line():
    record = logging.makeLogRecord({"msg": "connection opened", "client": "x\n12:00 info fake"})
    assert "\n" not in PlainFormatter().format(record)
    assert "\n" not in JsonFormatter().format(record)


async def test_a_log_line_per_question_without_its_text(caplog):
    caplog.set_level(logging.INFO)
    async with running(service()) as url, edge(url) as client:
        await client.ask("the secret word is xyzzy", picture())
        await client.next()
    records = [r for r in caplog.records if r.getMessage() == "question answered"]
    lines = [json.loads(JsonFormatter().format(record)) for record in records]
    assert len(lines) == 1
    assert lines[0]["outcome"] == "first"
    assert lines[0]["bytes_up"] > 0
    assert "xyzzy" not in caplog.text + json.dumps(lines)
    plain = PlainFormatter().format(records[0])
    assert "question answered" in plain
    assert f"bytes_up={lines[0]['bytes_up']}" in plain


def test_a_view_too_large_for_edges_is_warned_of_at_once(caplog):
    for width, warned in ((1024, False), (1025, True)):
        info = replace(DEFAULT_INFO, view=Size(width, 1024))
        service(FakeBackend(info=info))
        assert ("edges refuse a view of this size" in caplog.text) is warned
