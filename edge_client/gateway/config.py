"""Settings of the gateway, with safe defaults: localhost, limits on, nothing open to browsers."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_client.client import DEFAULT_DEADLINE_S
from vlm_collab.errors import ConfigError
from vlm_collab.openai import WireLimits
from vlm_collab.web.access import Rules, checked_names, is_loopback

DEFAULT_PORT = 8766


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds on what all clients together may occupy.

    Attributes:
        wire: bounds on one request.
        max_question_bytes: longest question with what was said before it, in UTF-8 bytes; None
            leaves it to the server, which has a bound of its own.
        max_requests: requests worked on at once; further ones wait.
        max_waiting: requests that wait; further ones get "busy, retry after".
        max_body_bytes: bodies of all that are worked on together; a single one always fits, and
            others wait for room.
        max_picture_bytes: memory for originals, so that a later question about one costs no
            pixels; the least recently used go first.
        max_pixels: most pixels of a picture; decoded, each takes 4 bytes.
        max_decoding: pictures that are decoded at once, of all cameras; the largest take gigabytes.
        max_responses, max_response_bytes: responses kept for `previous_response_id`, and their
            pictures' bytes; the oldest go first.
        max_answers, max_answer_bytes: what responses said, kept for references to it, and its
            UTF-8 bytes; what was referred to longest ago goes first.
        max_relays: connections of the page at once; as many more may not have sent anything yet.
        max_per_address: connections of any kind from one address; None for 64, except from this
            machine, where a proxy may stand; 0 for no bound, as behind a proxy elsewhere.
        write_timeout_s: how long a client may take nothing of what waits for it to read.
        body_timeout_s: time for a request's body to arrive.
        fetch_timeout_s: time for a picture to be fetched.
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
        if self.max_per_address is not None and self.max_per_address < 0:
            raise ConfigError(f"max_per_address must be 0 or more, not {self.max_per_address}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How the gateway listens and whom it lets in.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        api_key: what clients must send as `Authorization: Bearer`; None lets everyone in who can
            connect, which is refused on any address but loopback unless `allow_anonymous`.
        allow_anonymous: listen beyond loopback without a key all the same.
        origins: origins of browser pages that may use it, besides its own.
        host_names: names by which clients may call it without a key, besides `host`, loopback's
            and IP addresses.
        fetch_hosts: hosts, as `name`, `name:port` or address, from which pictures are fetched.
        aliases: names beside the model's own under which clients may ask for it.
        deadline_s: time for one question, waiting for the server included; so long a request may
            wait for its turn before.
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
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        if not self.deadline_s > 0:
            raise ConfigError(f"the deadline must be more than 0 s, not {self.deadline_s:g}")
        if self.api_key is not None and not _can_be_sent(self.api_key):
            raise ConfigError("the API key must be printable ASCII characters without blanks")
        checked_names(self.host_names)
        if "*" in self.origins:
            raise ConfigError("--origin takes the address of a page, such as https://example.org")
        if self.api_key is None and not self.allow_anonymous and not is_loopback(self.host):
            raise ConfigError(
                f"listening on {self.host} without an API key lets anyone in; "
                "give --api-key-file or VLM_COLLAB_API_KEY, or --allow-anonymous to mean it"
            )

    @property
    def rules(self) -> Rules:
        """Whom the gateway lets in."""
        return Rules(
            tokens=() if self.api_key is None else (self.api_key,),
            origins=self.origins,
            host_names=checked_names(self.host_names) | {self.host.lower()},
            who="gateway",
        )


def _can_be_sent(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key
