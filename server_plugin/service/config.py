"""Settings of the service, with safe defaults: localhost, limits on, closed to other origins."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_collab.errors import ConfigError
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.server_session import ServerLimits
from vlm_collab.web.access import Rules, checked_names
from vlm_collab.web.settings import check_max_per_address, check_not_open_to_all, check_port

ENDPOINT = "/v1/collab"
DEFAULT_PORT = 8765
MOST_QUESTION_BYTES = 2**20
"""Largest `max_question_bytes`: the view has to fit into the same frame."""

_OPTION = (
    '--{name} {value} (or, as `vllm serve`, with "{names}": ["{value}"] below "vlm_collab" in '
    "--additional-config)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """Bounds on what all clients together may use.

    Attributes:
        connection: bounds on one connection.
        max_connections: WebSockets open at once; further ones get HTTP 503.
        max_questions: questions accepted and not yet ended, including those that wait for a region.
        max_queue: questions waiting for the model; further ones get "busy, retry after".
        max_view_bytes: memory for views and what the model computed of them; the least recently
            used are dropped first.
        max_sessions: sessions whose views are kept after their connection has ended.
        session_ttl_s: how long such views are kept.
        max_newcomers: WebSockets that have not said `Hello` yet, not counted in `max_connections`;
            a further one replaces the oldest.
        max_per_address: connections of any kind from one address. None means 64, and no bound for
            this machine, where a proxy may run; 0 means no bound, as behind a proxy elsewhere.
        hello_timeout_s: how long a new connection may stay silent.
        write_timeout_s: how long a client may read nothing while data wait for it.
        question_timeout_s: longest time from accepting a question to its answer.
        region_deadline_s: longest wait for a region.
        shutdown_grace_s: how long a shutdown waits for questions in flight.
    """

    connection: ServerLimits = field(default_factory=ServerLimits)
    max_connections: int = 256
    max_questions: int = 512
    max_queue: int = 256
    max_view_bytes: int = 2 * 2**30
    max_sessions: int = 1024
    session_ttl_s: float = 300.0
    max_newcomers: int = 64
    max_per_address: int | None = None
    hello_timeout_s: float = 10.0
    write_timeout_s: float = 20.0
    question_timeout_s: float = 120.0
    region_deadline_s: float = 10.0
    shutdown_grace_s: float = 20.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name in ("connection", "max_per_address"):
                continue
            if value <= 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        check_max_per_address(self.max_per_address)


def service_limits(*, max_question_bytes: int | None = None, **others: Any) -> ServiceLimits:
    """Make limits from options.

    Args:
        max_question_bytes: see `ServerLimits`; None leaves the default.
        others: fields of `ServiceLimits`.

    Raises:
        ConfigError: a value is out of range.
    """
    if max_question_bytes is None:
        return ServiceLimits(**others)
    if not 1 <= max_question_bytes <= MOST_QUESTION_BYTES:
        raise ConfigError(
            f"max_question_bytes must be from 1 to {MOST_QUESTION_BYTES}, not {max_question_bytes}"
        )
    return ServiceLimits(connection=ServerLimits(max_question_bytes=max_question_bytes), **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiLimits:
    """Bounds on the OpenAI-compatible endpoint, in addition to `ServiceLimits`.

    Attributes:
        max_body_bytes: largest request; base64 makes a picture 4/3 as large.
        max_bodies_bytes: all requests together that are being read or answered; further ones get
            HTTP 429.
        max_picture_pixels: most pixels of a picture, width × height.
        max_decoding: pictures decoded at once, which bounds the memory that pixels take.
        region_deadline_s: how long a response that asks for a region waits for it. Its view stays
            in memory meanwhile.
        keep_s: how long a response can be continued (`previous_response_id`); the pictures of its
            conversation are kept with it.
        keep_answers_s: how long a response's text can be referred to (`item_reference`); each
            reference restarts the time.
        max_kept: responses kept, and texts of responses.
        max_kept_bytes: memory for the texts and encoded pictures of kept responses.
        max_answers_bytes: memory for the texts that can be referred to.
    """

    max_body_bytes: int = 64 * 2**20
    max_bodies_bytes: int = 512 * 2**20
    max_picture_pixels: int = 50_000_000
    max_decoding: int = 2
    region_deadline_s: float = 30.0
    keep_s: float = 300.0
    keep_answers_s: float = 24 * 3600.0
    max_kept: int = 4096
    max_kept_bytes: int = 256 * 2**20
    max_answers_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where the service listens, and who may use it.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        token: bearer token that every client must send; None: no token is needed. Then only
            loopback addresses are accepted unless `allow_anonymous`.
        more_tokens: further valid tokens.
        allow_anonymous: allow other addresses than loopback without a token.
        tls_cert, tls_key: PEM files; both or neither.
        origins: origins of browser pages that may connect, besides this server's own.
        host_names: names by which clients without a token may address the server, besides `host`,
            loopback's and IP addresses.
        codecs: accepted image formats, best first.
        region_codec, region_quality: how the edge is asked to encode regions. A client that does
            not know the format is asked for the best of `codecs` that it knows.
        limits: see `ServiceLimits`.
        openai: see `OpenAiLimits`.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token: str | None = None
    more_tokens: tuple[str, ...] = ()
    allow_anonymous: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    origins: frozenset[str] = frozenset()
    host_names: frozenset[str] = frozenset()
    codecs: tuple[Codec, ...] = (Codec.JPEG, Codec.WEBP, Codec.PNG)
    region_codec: Codec = Codec.JPEG
    region_quality: int = 90
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    openai: OpenAiLimits = field(default_factory=OpenAiLimits)

    def __post_init__(self) -> None:
        check_port(self.port)
        if not 1 <= self.region_quality <= 100:
            raise ConfigError(f"quality must be between 1 and 100, not {self.region_quality}")
        if self.token is not None and not self.token.strip():
            raise ConfigError("the token is empty")
        # A header cannot carry such characters, so no client could ever send the token.
        if self.token is not None and (self.token != self.token.strip() or "\n" in self.token):
            raise ConfigError(
                "the token must not begin or end with blanks, nor contain line breaks"
            )
        checked_names(self.host_names)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both a certificate and a key file")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise ConfigError(f"no such TLS file: {file}")
        check_not_open_to_all(
            self.host,
            self.token,
            allow_anonymous=self.allow_anonymous,
            token_name="a token",
            options="--token-file or VLM_COLLAB_TOKEN",
        )

    @property
    def scheme(self) -> str:
        """`wss` with TLS files, else `ws`."""
        return "wss" if self.tls_cert else "ws"

    @property
    def rules(self) -> Rules:
        """The access rules that follow from these settings."""
        return Rules(
            tokens=() if self.token is None else (self.token, *self.more_tokens),
            origins=self.origins,
            host_names=checked_names(self.host_names) | {self.host.lower()},
            option=_OPTION,
        )
