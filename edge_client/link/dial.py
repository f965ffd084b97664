"""Open a WebSocket to a server, or report in one line why that failed."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    InvalidHandshake,
    InvalidMessage,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    NegotiationError,
)
from websockets.http11 import Response
from websockets.typing import Subprotocol

from edge_client.addresses import without_secrets
from vlm_collab import __version__
from vlm_collab.errors import AuthenticationError, ConfigError, LinkError
from vlm_collab.protocol.messages import SUBPROTOCOL

DEFAULT_URL = "ws://127.0.0.1:8765/v1/collab"
ENDPOINT = "/v1/collab"

CLIENT_NAME = f"vlm-collab/{__version__}"

# The server is restarting or full: another attempt can help.
_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_MAX_REFUSAL_CHARS = 400


class LostError(LinkError):
    """The link is lost or cannot be made now; another attempt can help.

    Args:
        message: one line for the user.
        retry_after_s: when to try again, as the server asked; None if it did not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Address of the service and how to connect to it.

    Attributes:
        url: `ws://host:port` or `wss://host:port`; without a path, `ENDPOINT` is added.
        token: sent as `Authorization: Bearer`; None for a server that needs none.
        ca_file: PEM file of certificate authorities to trust instead of the system's, for `wss`.
        proxy: address of an HTTP or SOCKS proxy. Proxy settings from the environment are ignored,
            so that the same call always takes the same route.
        connect_timeout_s: time for one attempt, until the server's `Welcome`.
        ping_interval_s: how often a silent link is checked. A link that does not answer within
            the same time is lost.

    Raises:
        ConfigError: invalid address, token or time.
    """

    url: str = DEFAULT_URL
    token: str | None = field(default=None, repr=False)
    ca_file: str | Path | None = None
    proxy: str | None = None
    connect_timeout_s: float = 10.0
    ping_interval_s: float = 20.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _full_url(self.url))
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("the token must be printable ASCII characters")
        for name in ("connect_timeout_s", "ping_interval_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0")

    @property
    def display_url(self) -> str:
        """The address without secrets, for messages and logs."""
        return without_secrets(self.url)


class _Connect(connect):
    """`connect` without redirects: pictures go only to the server that the audit log names."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Refuse the redirect."""
        return exc


async def dial(server: Server, *, max_frame_bytes: int) -> ClientConnection:
    """Open a WebSocket. The caller limits the time.

    Raises:
        LostError: the server cannot be reached now.
        AuthenticationError: the server does not accept the token or the origin.
        LinkError: it is not a vlm-collab server, or its certificate is not trusted.
        ConfigError: the address, proxy or CA file is wrong.
    """
    headers = {} if server.token is None else {"Authorization": f"Bearer {server.token}"}
    context = _tls(server)
    try:
        # On time-out or any other error the library closes the connection itself.
        connection = await _Connect(
            server.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,  # images do not compress further, and byte counts stay exact
            additional_headers=headers,
            user_agent_header=CLIENT_NAME,
            proxy=server.proxy,
            open_timeout=None,
            ping_interval=server.ping_interval_s,
            ping_timeout=server.ping_interval_s,
            close_timeout=1,
            max_size=max_frame_bytes,
            ssl=context,
        )
    except InvalidURI as error:
        raise ConfigError(f"{server.display_url} is not a server address: {error.msg}") from error
    except InvalidProxy as error:
        raise ConfigError(
            f"{without_secrets(error.proxy)} is not a proxy address: {error.msg}"
        ) from error
    except InvalidStatus as error:
        raise _refusal(server, error.response) from error
    except InvalidMessage as error:
        if isinstance(error.__cause__, EOFError):
            raise LostError(
                f"{server.display_url} closed the connection without a response"
            ) from error
        raise LinkError(f"{server.display_url} does not answer in HTTP") from error
    except (InvalidHandshake, NegotiationError) as error:
        raise LinkError(f"{server.display_url} is not a vlm-collab server: {error}") from error
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message or str(error)
        raise LinkError(
            f"the certificate of {server.display_url} is not trusted: {reason} "
            "(give a CA file to trust it)"
        ) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise LostError(f"{server.display_url} closed the connection without a response") from error
    except ssl.SSLError as error:
        raise LinkError(f"TLS with {server.display_url} failed: {error.reason or error}") from error
    except OSError as error:
        raise LostError(f"cannot connect to {server.display_url}: {_why(error)}") from error
    if connection.subprotocol != SUBPROTOCOL:
        connection.transport.abort()
        raise LinkError(f"{server.display_url} does not speak {SUBPROTOCOL}")
    return connection


def _full_url(url: str) -> str:
    example = f"it looks like {DEFAULT_URL.removesuffix(ENDPOINT)}"
    # If a password was not percent-encoded, address and password cannot be told apart.
    unclear = "@" in url
    name = "the given text" if unclear else repr(without_secrets(url))
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        why = "" if unclear else f" ({error})"
        raise ConfigError(f"{name} is not a server address{why}; {example}") from None
    if parts.scheme not in ("ws", "wss") or not host or parts.fragment:
        raise ConfigError(f"{name} is not a server address; {example}")
    if parts.username is not None:
        raise ConfigError("a server address must not contain a name or password; use a token")
    path = parts.path if parts.path.strip("/") else ENDPOINT
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _tls(server: Server) -> ssl.SSLContext | None:
    if not server.url.startswith("wss:"):
        if server.ca_file is not None:
            raise ConfigError("a CA file needs a wss:// address")
        return None
    try:
        return ssl.create_default_context(cafile=server.ca_file)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        raise ConfigError(f"CA file {server.ca_file}: {reason}") from error


def _refusal_text(response: Response) -> str:
    """Return ": " and the text line of a refusal; empty if there is none."""
    if not response.headers.get("Content-Type", "").startswith("text/plain"):
        return ""
    line = bytes(response.body or b"").partition(b"\n")[0].decode(errors="replace").strip()
    printable = "".join(char for char in line if char.isprintable())[:_MAX_REFUSAL_CHARS]
    return f": {printable}" if printable else ""


def _refusal(server: Server, response: Response) -> LinkError | AuthenticationError:
    """Convert an HTTP status other than 101 to an error."""
    status = response.status_code
    if status == 401:
        wrong = "no token was given" if server.token is None else "the token is not accepted"
        return AuthenticationError(f"{server.display_url} needs a valid token: {wrong} (HTTP 401)")
    if status == 403:
        text = _refusal_text(response)
        return AuthenticationError(f"{server.display_url} refuses this client (HTTP 403){text}")
    if status in _TRANSIENT_STATUS:
        wait = response.headers.get("Retry-After", "")
        retry_after_s = float(wait) if wait.isascii() and wait.isdecimal() else None
        return LostError(
            f"{server.display_url} accepts no connections now (HTTP {status})", retry_after_s
        )
    if 300 <= status < 400:
        return LinkError(
            f"{server.display_url} redirects to another address (HTTP {status}); give that address"
        )
    return LinkError(f"{server.display_url} is not a vlm-collab server (HTTP {status})")


def _why(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error) or type(error).__name__
