"""Front-end side of the row capture: fetches rows from all workers in few calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.rows import mean_over_ranks
from vlm_collab.errors import ConfigError, ModelError

WorkerCall = Callable[..., Awaitable[Any]]
"""Calls a method of all workers, by name and with arguments; returns their results."""

MOST_WAITING = 64
"""Rows that may wait in the workers before a call fetches them, needed or not. Far fewer than
`capture.MAX_ROWS`, from which on workers drop the oldest."""


class ExpectedRow:
    """A row that stays in the workers until it is fetched."""

    def __init__(self, client: RowClient, row: asyncio.Future[NDArray[np.float32]]) -> None:
        self._client = client
        self._row = row

    async def fetch(self) -> NDArray[np.float32]:
        """Return the row; fetches it on the first call only.

        Returns:
            Mean over heads, float32, one entry per position of the span.

        Raises:
            ModelError: no worker has the row, or the engine accepts no calls any more.
        """
        if not self._row.done():
            self._client.call_soon()
        # Shielded: a caller that is cancelled must not cancel the row for others.
        return await asyncio.shield(self._row)


class RowClient:
    """Fetches rows from the workers of one engine.

    A call pauses the engine's loop for a moment, so calls are few. The first request for a row
    starts one, and it fetches all rows that are captured by then, so that workers do not keep rows
    that nobody needs.

    Args:
        call: see `WorkerCall`.
        layer: decoder layer, from 0, whose rows are read.
        heads: attention heads of the layer, over all ranks.
        scope: a secret prefix of the keys of all rows; workers serve no other keys.
    """

    def __init__(self, call: WorkerCall, layer: int, heads: int, scope: str) -> None:
        self._call = call
        self._layer = layer
        self._heads = heads
        self._scope = scope
        self._installed = False
        self._install_lock = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[NDArray[np.float32]]] = {}
        """Rows that no call has fetched yet, by key and in order."""
        self._urgent = False
        self._fetching: asyncio.Task[None] | None = None

    async def install(self) -> None:
        """Install the capture in the workers, once.

        Raises:
            ConfigError: they cannot capture; one line with vLLM's version and what is missing.
        """
        async with self._install_lock:
            if self._installed:
                return
            try:
                answers = await self._call(capture.INSTALL, self._layer, self._scope)
            except ModelError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                if capture.INSTALL not in reason:  # vLLM names a method that it does not find
                    raise ConfigError(f"vLLM's workers did not reply: {reason}") from error
                raise ConfigError(
                    "vLLM's workers do not know the plugin vlm_collab: install vlm-collab beside "
                    f"vLLM, and name it in VLLM_PLUGINS if that is set ({reason})"
                ) from error
            for answer in answers:
                if "error" in answer:
                    raise ConfigError(answer["error"])
            found = sum(answer["heads"] for answer in answers)
            if found != self._heads:
                raise ConfigError(
                    f"vLLM's workers have {found} attention heads of layer {self._layer}, the "
                    f"checkpoint {self._heads}: rows would be incomplete"
                )
            self._installed = True

    def expect(self, key: str) -> ExpectedRow:
        """Register a row that is captured by now, or never will be. It need not be fetched."""
        row: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._waiting[key] = row
        if len(self._waiting) >= MOST_WAITING:
            self.call_soon()
        return ExpectedRow(self, row)

    def call_soon(self) -> None:
        """Fetch all waiting rows in one call, after the call that runs now."""
        self._urgent = True
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        while self._urgent:
            self._urgent = False
            waiting, self._waiting = self._waiting, {}
            if not waiting:
                break
            try:
                ranks = await self._call(capture.TAKE, list(waiting))
                parts = list(zip(*ranks, strict=True))  # per row: the parts of all ranks
            except Exception as error:
                lost = ModelError(
                    f"vLLM returned no attention rows: {' '.join(str(error).split())}"
                )
                outcomes: list[NDArray[np.float32] | ModelError] = [lost] * len(waiting)
            else:
                outcomes = [self._mean(part) for part in parts]
            for row, outcome in zip(waiting.values(), outcomes, strict=True):
                if isinstance(outcome, ModelError):
                    row.set_exception(outcome)
                    row.exception()  # so that asyncio does not log it if nobody fetches the row
                else:
                    row.set_result(outcome)
        self._fetching = None

    def _mean(self, parts: Sequence[tuple[bytes, int] | None]) -> NDArray[np.float32] | ModelError:
        try:
            return mean_over_ranks(parts, self._heads)
        except ValueError as error:
            return ModelError(f"an attention row is missing: {error}")
