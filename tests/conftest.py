"""Settings for all tests, and the clean-up after each."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The time of an example depends on how busy the machine is, so there is no deadline. On a new
# machine, hypothesis also builds its table of characters within the first example that needs it.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# The root logger, and those that the commands for servers configure (`server_plugin.service.logs`,
# `edge_client.cli.gateway`).
_CONFIGURED = (
    None,
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "websockets",
    "httpx",
    "httpcore",
)


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Restore logging after each test: a command logs to the stderr of the test that called it."""
    loggers = [logging.getLogger(name) for name in _CONFIGURED]
    before = [
        (list(it.handlers), list(it.filters), it.level, it.propagate, it.disabled) for it in loggers
    ]
    yield
    for logger, (handlers, filters, level, propagate, disabled) in zip(
        loggers, before, strict=True
    ):
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.propagate, logger.disabled = propagate, disabled
        logger.setLevel(level)
