"""What no test may leave behind in the process that runs the next one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is. On a fresh one, hypothesis also builds
# its table of characters within the first example that needs it.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# The root, and those that the commands for servers set up (`server_plugin.service.logs`,
# `edge_client.cli.gateway`).
_SET_UP = (None, "uvicorn", "uvicorn.error", "uvicorn.access", "websockets", "httpx", "httpcore")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Takes back a command's logging, whose stderr closes with the test that called it."""
    loggers = [logging.getLogger(name) for name in _SET_UP]
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
