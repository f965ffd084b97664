"""Checks of settings that the gateway and the service have in common."""

from __future__ import annotations

import ipaddress

from vlm_collab.errors import ConfigError


def check_port(port: int) -> None:
    """Check the port to listen on; 0 takes a free one.

    Raises:
        ConfigError: there is no such port.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535, not {port}")


def check_max_per_address(most: int | None) -> None:
    """Check the limit of connections per address; see `ConnectionSlots` for None and 0.

    Raises:
        ConfigError: it is negative.
    """
    if most is not None and most < 0:
        raise ConfigError(f"max_per_address must be 0 or more, not {most}")


def check_not_open_to_all(
    host: str, token: str | None, *, allow_anonymous: bool, token_name: str, options: str
) -> None:
    """Check that a server without a token listens on loopback only, unless its owner allows more.

    Args:
        host: address to listen on.
        token: the token that clients need; None lets everyone in.
        allow_anonymous: allow other addresses than loopback without a token.
        token_name: what messages call the token, with its article.
        options: the options that set a token, for the message.

    Raises:
        ConfigError: anyone who reaches the address could use the server.
    """
    if token is None and not allow_anonymous and not is_loopback(host):
        raise ConfigError(
            f"listening on {host} without {token_name} lets anyone use the server; "
            f"give {options}, or --allow-anonymous to allow this"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
