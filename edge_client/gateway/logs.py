"""The gateway's logs: what they say, and what of it strangers can cause."""

from __future__ import annotations

import logging

from vlm_collab.web.log_throttle import LogThrottle

REFUSED = "a %s was refused: %s"
"""Of a request that may not use the gateway."""
PAGE_REFUSED = "the page was refused: %s"
"""Of a page that cannot connect."""

# These tell whole addresses of pictures, and frames and headers with tokens and questions.
_QUIETER = {
    "httpx": logging.WARNING,
    "httpcore": logging.INFO,
    "websockets": logging.INFO,
    "uvicorn": logging.INFO,
}


def configure(level: str) -> None:
    """Set up the process's logs. Called by the command line, never by the library.

    Args:
        level: `debug`, `info`, `warning` or `error`.
    """
    lowest = getattr(logging, level.upper())
    logging.basicConfig(level=lowest, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    quiet = LogThrottle(frozenset({REFUSED, PAGE_REFUSED}), as_extra=False)
    for handler in logging.getLogger().handlers:
        handler.addFilter(quiet)
    for name, most in _QUIETER.items():
        logging.getLogger(name).setLevel(max(most, lowest))
