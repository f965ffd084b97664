"""Settings of the gateway. The defaults are safe: only localhost, limits, no other origins."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_client.client import DEFAULT_DEADLINE_S
from vlm_collab.errors import ConfigError
from vlm_collab.openai import WireLimits
from vlm_collab.web.access import Rules, checked_names
from vlm_collab.web.settings import check_max_per_address, check_not_open_to_all, check_port

DEFAULT_PORT = 8766


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Limits on the resources of all clients together.

    Attributes:
        wire: bounds on one request.
        max_question_bytes: longest question with its conversation, in UTF-8 bytes; None leaves it
            to the server, which has its own bound.
        max_requests: running requests; further ones wait.
        max_waiting: waiting requests; further ones get HTTP 429.
        max_body_bytes: bodies of all running requests together. A single one always fits, and
            others wait for room.
        max_picture_bytes: memory for originals, so that later questions about the same picture need
            not decode it again; the least recently used are dropped first.
        max_pixels: most pixels of a picture; decoded, each takes 4 bytes.
        max_decoding: pictures decoded at the same time, of all cameras; the largest take gigabytes.
        max_responses, max_response_bytes: number of responses kept for `previous_response_id`, and
            bytes of their pictures and texts; the least recently used are dropped first.
        max_answers, max_answer_bytes: number of answers kept for references to them, and their
            UTF-8 bytes; the least recently used are dropped first.
        max_relays: WebSockets of the page; as many more may be open that have not sent a frame.
        max_per_address: connections of any kind per address; None for 64, but no limit for this
            machine, where a proxy may run; 0 for no limit, which a proxy elsewhere needs.
        write_timeout_s: a client that reads none of its waiting data for this long is dropped.
        body_timeout_s: time for a request's body to arrive.
        fetch_timeout_s: time for fetching a picture.
    """

    wire: WireLimits = field(default_factory=WireLimits)
    max_question_bytes: int | None = None
    max_requests: int = 32
    max_waiting: int = 256
    max_body_bytes: int = 256 * 2**20
    max_picture_bytes: int = 256 * 2**20
    max_pixels: int = 120_000_000
    max_decoding: int = 2
    max_responses: int = 256
    max_response_bytes: int = 256 * 2**20
    max_answers: int = 4096
    max_answer_bytes: int = 16 * 2**20
    max_relays: int = 16
    max_per_address: int | None = None
    write_timeout_s: float = 20.0
    body_timeout_s: float = 60.0
    fetch_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_max_per_address(self.max_per_address)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where the gateway listens, and who may use it.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        api_key: the key that clients must send as `Authorization: Bearer`. None lets everyone in;
            this is refused on other addresses than loopback unless `allow_anonymous` is set.
        allow_anonymous: allow listening beyond loopback without a key.
        origins: origins of browser pages that may use it, besides its own.
        host_names: names by which clients may call the gateway without a key, besides `host`,
            loopback names and IP addresses.
        fetch_hosts: hosts from which pictures may be fetched, as `name`, `name:port` or address.
        aliases: further names by which clients may call the model.
        deadline_s: time for one question, including the wait for the server. Before that, a
            request may wait for its admission as long again.
        limits: see `GatewayLimits`.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None
    allow_anonymous: bool = False
    origins: frozenset[str] = frozenset()
    host_names: frozenset[str] = frozenset()
    fetch_hosts: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    deadline_s: float = DEFAULT_DEADLINE_S
    limits: GatewayLimits = field(default_factory=GatewayLimits)

    def __post_init__(self) -> None:
        check_port(self.port)
        if not self.deadline_s > 0:
            raise ConfigError(f"the deadline must be more than 0 s, not {self.deadline_s:g}")
        if self.api_key is not None and not _is_valid_key(self.api_key):
            raise ConfigError("the API key must be printable ASCII characters without spaces")
        checked_names(self.host_names)
        if "*" in self.origins:
            raise ConfigError("--origin takes the origin of a page, such as https://example.org")
        check_not_open_to_all(
            self.host,
            self.api_key,
            allow_anonymous=self.allow_anonymous,
            token_name="an API key",
            options="--api-key-file or VLM_COLLAB_API_KEY",
        )

    @property
    def rules(self) -> Rules:
        """The gateway's access rules."""
        return Rules(
            tokens=() if self.api_key is None else (self.api_key,),
            origins=self.origins,
            host_names=checked_names(self.host_names) | {self.host.lower()},
            who="gateway",
        )


def _is_valid_key(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key
