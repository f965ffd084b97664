"""The gateway's logs."""

from __future__ import annotations

import logging

from vlm_collab.web.log_throttle import LogThrottle

REFUSED = "a %s was refused: %s"
"""Logged for a request that the access rules refuse."""
PAGE_REFUSED = "the page was refused: %s"
"""Logged for a page that cannot connect."""

# At lower levels these log picture addresses, and frames and headers with tokens and questions.
_LIBRARY_LEVELS = {
    "httpx": logging.WARNING,
    "httpcore": logging.INFO,
    "websockets": logging.INFO,
    "uvicorn": logging.INFO,
}


def configure(level: str) -> None:
    """Set up the process's logs. Only the command line calls this, never the library.

    Args:
        level: `debug`, `info`, `warning` or `error`.
    """
    lowest = getattr(logging, level.upper())
    logging.basicConfig(level=lowest, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    throttle = LogThrottle(frozenset({REFUSED, PAGE_REFUSED}), as_extra=False)
    for handler in logging.getLogger().handlers:
        handler.addFilter(throttle)
    for name, most in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(max(most, lowest))
