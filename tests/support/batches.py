"""Helpers that make a backend's operations run in one batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from server_plugin.backends.transformers.backend import TransformersBackend
from tests.support.patience import PATIENCE_S


@contextmanager
def together(backend: TransformersBackend) -> Iterator[list[int]]:
    """Hold operations until the `with` block ends; yield the batch size of each forward."""
    gate, sizes = threading.Event(), []
    hook = backend._adapter.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    backend._worker.call(lambda: gate.wait(PATIENCE_S))
    try:
        yield sizes
    finally:
        gate.set()
        backend._worker.call(hook.remove)


async def queued(*operations: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    """Start operations; return their tasks once all are queued."""
    tasks = [asyncio.ensure_future(operation) for operation in operations]
    await asyncio.sleep(0.01)
    return tasks
