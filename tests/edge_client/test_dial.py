"""Server addresses, and the error messages when no server answers."""

from __future__ import annotations

import ssl

import pytest
import trustme

from edge_client.link.dial import DEFAULT_URL, LostError, Server
from edge_client.link.link import Link
from tests.edge_client.scripted import Peer, replying, scripted, unused_url
from vlm_collab.errors import AuthenticationError, ConfigError, LinkError
from vlm_collab.protocol.edge_session import EdgeLimits


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("ws://here:8765", "ws://here:8765/v1/collab"),
        ("ws://here:8765/", "ws://here:8765/v1/collab"),
        ("wss://here", "wss://here/v1/collab"),
        ("ws://[::1]:1/else/where", "ws://[::1]:1/else/where"),
        ("ws://here/x?y=1", "ws://here/x?y=1"),
        (DEFAULT_URL, DEFAULT_URL),
    ],
)
def test_addresses_without_a_path_get_the_default_path(given, full):
    assert Server(url=given).url == full


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "here",
        "here:8765",
        "http://here",
        "ws://",
        "ws://here:port",
        "ws://a:b@here",
        "ws://h#x",
    ],
)
def test_wrong_addresses_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as caught:
        Server(url=wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["two\nlines", "schlüssel", "a\0b"])
def test_a_token_must_fit_in_a_header(token):
    with pytest.raises(ConfigError, match="token"):
        Server(token=token)


@pytest.mark.parametrize("wrong", [{"connect_timeout_s": 0}, {"ping_interval_s": -1}])
def test_invalid_times_are_refused(wrong):
    with pytest.raises(ConfigError, match="more than 0"):
        Server(**wrong)


async def opened(url: str, **settings: object) -> Link:
    return await Link.open(Server(url=url, **settings), limits=EdgeLimits())


async def test_a_closed_port_is_reported():
    with pytest.raises(LostError, match="nothing listens there"):
        await opened(await unused_url())


async def test_an_unknown_host_is_reported():
    with pytest.raises(LinkError, match="no such host"):
        await opened("ws://no-such-host.invalid:1")


@pytest.mark.parametrize(
    ("reply", "kind", "line"),
    [
        (b"", LostError, "closed the connection without a response"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", LinkError, "does not answer in HTTP"),
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", AuthenticationError, "HTTP 401"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", AuthenticationError, "HTTP 403"),
        (
            b"HTTP/1.1 403 No\r\nContent-Type: text/plain\r\n\r\nuse \x1b[2Jlocalhost\nor go",
            AuthenticationError,
            r"HTTP 403\): use \[2Jlocalhost$",
        ),
        (
            b"HTTP/1.1 403 No\r\nContent-Type: text/html\r\n\r\n<html>",
            AuthenticationError,
            r"HTTP 403\)$",
        ),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", LinkError, "HTTP 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", LinkError, "HTTP 200"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\n\r\n", LostError, "HTTP 503"),
        (b"HTTP/1.1 101 Fine\r\nUpgrade: other\r\n\r\n", LinkError, "is not a vlm-collab server"),
    ],
)
async def test_other_servers_are_reported_in_one_line(reply, kind, line):
    async with replying(reply) as url:
        with pytest.raises(kind, match=line) as caught:
            await opened(url)
    assert "\n" not in str(caught.value)
    if b"503" in reply:
        assert caught.value.retry_after_s == 7.0
    else:
        assert isinstance(caught.value, LostError) == (reply == b"")


@pytest.mark.parametrize(
    "reply", [b"", b"SSH\r\n", *(b"HTTP/1.1 %d No\r\n\r\n" % n for n in (302, 401, 403, 404, 503))]
)
async def test_a_token_in_the_address_is_not_repeated(reply):
    async with replying(reply) as url:
        with pytest.raises((LinkError, AuthenticationError)) as caught:
            await opened(f"{url}/v1/collab?token=s3cret")
    assert "s3cret" not in str(caught.value)
    assert f"{url}/v1/collab" in str(caught.value)


async def test_a_token_in_the_address_is_not_repeated_if_nothing_answers(tmp_path):
    for address, settings in [
        (await unused_url(), {}),
        ("ws://no-such-host.invalid:1", {}),
        ((await unused_url()).replace("ws:", "wss:"), {"ca_file": tmp_path / "none"}),
        (await unused_url(), {"proxy": "http://me:s3cret@:1"}),
        (await unused_url(), {"proxy": "nonsense://me:s3cret@here:1?key=s3cret"}),
    ]:
        with pytest.raises((LinkError, ConfigError)) as caught:
            await opened(f"{address}/?token=s3cret", **settings)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(Server(url="ws://here", token="s3cret"))


@pytest.mark.parametrize(
    "wrong",
    [
        "http://here?token=s3cret",
        "here?token=s3cret",
        "ws://?token=s3cret",
        "ws://here:port/?token=s3cret",
        "ws://here/?token=s3cret#x",
        "ws://here/#s3cret",
        "ws://me:s3cret@here",
        "http://me:s3cret@here",
        "ws://me:s3cret?more@here",
        "ws://me:s3cret/more@here",
        "me:s3cret@here",
    ],
)
def test_a_token_in_a_wrong_address_is_not_repeated(wrong):
    with pytest.raises(ConfigError) as caught:
        Server(url=wrong)
    assert "s3cret" not in str(caught.value)


async def test_redirects_are_not_followed():
    """The audit log names the given address, so pictures must go there."""
    connected: list[str] = []

    async def script(peer: Peer) -> None:
        connected.append("here")
        await peer.greet()

    async with scripted(script) as elsewhere:
        reply = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n"
        async with replying(reply.encode()) as url:
            with pytest.raises(LinkError, match="redirects to another address") as caught:
                await Link.open(Server(url=url), limits=EdgeLimits())
    assert not isinstance(caught.value, LostError)
    assert connected == []


async def test_the_token_is_sent_and_its_absence_is_reported():
    async with scripted(Peer.greet) as server:
        await (await opened(server.url, token="s3cret")).close()
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
        await (await opened(server.url)).close()
        assert "Authorization" not in server.headers[1]
        assert server.headers[1]["User-Agent"].startswith("vlm-collab/")
    async with replying(b"HTTP/1.1 401 Unauthorized\r\n\r\n") as url:
        with pytest.raises(AuthenticationError, match="no token was given"):
            await opened(url)
        with pytest.raises(AuthenticationError, match="not accepted"):
            await opened(url, token="wrong")


async def test_a_server_without_the_subprotocol_is_refused():
    async with scripted(Peer.greet, subprotocols=None) as server:
        with pytest.raises(LinkError, match=r"does not speak vlm-collab\.v1"):
            await opened(server.url)


async def test_environment_proxies_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", await unused_url())
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    async with scripted(Peer.greet) as server:
        await (await opened(server.url)).close()


async def test_a_given_proxy_is_used():
    async with scripted(Peer.greet) as server:
        nowhere = (await unused_url()).replace("ws://", "http://")
        with pytest.raises(LinkError):
            await opened(server.url, proxy=nowhere)
        with pytest.raises(ConfigError):
            await opened(server.url, proxy="nonsense")


async def test_the_servers_certificate_is_checked(tmp_path):
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    async with scripted(Peer.greet, ssl=context) as server:
        await (await opened(server.url, ca_file=file)).close()
        with pytest.raises(LinkError, match="not trusted") as caught:
            await opened(server.url)
        assert not isinstance(caught.value, LostError)
        # A plain connection to a TLS server, and the reverse.
        with pytest.raises(LinkError):
            await opened(server.url.replace("wss:", "ws:"))
    async with scripted(Peer.greet) as plain:
        with pytest.raises(LinkError):
            await opened(plain.url.replace("ws:", "wss:"))


async def test_wrong_ca_files_are_refused(tmp_path):
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    for file in (empty, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=file.name):
            await opened("wss://127.0.0.1:1", ca_file=file)
    with pytest.raises(ConfigError, match="needs a wss"):
        await opened("ws://127.0.0.1:1", ca_file=empty)
