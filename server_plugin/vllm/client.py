"""The front-end's end of the row capture: calls to all workers, few and together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server_plugin.vllm import capture
from server_plugin.vllm.rows import mean_over_ranks
from vlm_collab.errors import ConfigError, ModelError

WorkerCall = Callable[[str, Any], Awaitable[Any]]


class RowClient:
    """Fetches rows from the workers of one engine.

    A call holds up the engine's loop for a moment, so there are few: none before a row is asked
    for, and then all that are known to be there travel in it.

    Args:
        call: calls a method of all workers, by name and with one argument; gives their results.
        layer: decoder layer, from 0, whose rows are read.
        heads: its attention heads, on all ranks together.
    """

    def __init__(self, call: WorkerCall, layer: int, heads: int) -> None:
        self._call = call
        self._layer = layer
        self._heads = heads
        self._installed = False
        self._install_lock = asyncio.Lock()
        self._rows: dict[str, asyncio.Future[NDArray[np.float32]]] = {}
        self._waiting: dict[str, None] = {}
        """Keys that no call has carried yet, in order."""
        self._urgent = False
        self._fetching: asyncio.Task[None] | None = None

    async def install(self) -> None:
        """Have the workers begin, once.

        Raises:
            ConfigError: they cannot; one line with vLLM's version and what is missing.
        """
        async with self._install_lock:
            if self._installed:
                return
            try:
                answers = await self._call(capture.INSTALL, self._layer)
            except ModelError:
                raise
            except Exception as error:
                raise ConfigError(
                    "vLLM's workers do not know the plugin vlm_collab: install vlm-collab beside "
                    "vLLM, and name it in VLLM_PLUGINS if that is set "
                    f"({' '.join(str(error).split())[:200]})"
                ) from error
            for answer in answers:
                if "error" in answer:
                    raise ConfigError(answer["error"])
            found = sum(answer["heads"] for answer in answers)
            if found != self._heads:
                raise ConfigError(
                    f"vLLM's workers have {found} attention heads of layer {self._layer}, the "
                    f"checkpoint {self._heads}: rows cannot be put together"
                )
            self._installed = True

    def expect(self, key: str) -> None:
        """Say that a row is there now. It comes with the next call; `take` or `leave` follows."""
        self._rows[key] = asyncio.get_running_loop().create_future()
        self._waiting[key] = None

    async def take(self, key: str) -> NDArray[np.float32]:
        """A row, which can be taken once.

        Returns:
            Mean over heads, float32, one entry per position of the span.

        Raises:
            ModelError: no worker has it.
        """
        if key not in self._rows:
            self.expect(key)
        if key in self._waiting:
            self._urgent = True
            if self._fetching is None:
                self._fetching = asyncio.create_task(self._fetch())
        try:
            return await self._rows[key]
        finally:
            self.leave(key)

    def leave(self, key: str) -> None:
        """Nobody will take this row. The next call still carries it, so that no worker keeps it."""
        future = self._rows.pop(key, None)
        if future is not None:
            future.cancel()

    async def _fetch(self) -> None:
        while self._urgent:
            self._urgent = False
            keys, self._waiting = list(self._waiting), {}
            try:
                ranks = await self._call(capture.TAKE, keys)
                parts = list(zip(*ranks, strict=True))  # of each row: what each rank has
            except Exception as error:
                lost = ModelError(f"vLLM gave no attention rows: {' '.join(str(error).split())}")
                outcomes: list[NDArray[np.float32] | ModelError] = [lost] * len(keys)
            else:
                outcomes = [self._mean(part) for part in parts]
            for key, outcome in zip(keys, outcomes, strict=True):
                future = self._rows.get(key)
                if future is None or future.done():  # whoever wanted it is gone
                    continue
                if isinstance(outcome, ModelError):
                    future.set_exception(outcome)
                    future.exception()  # if nobody takes it, it is no news
                else:
                    future.set_result(outcome)
        self._fetching = None

    def _mean(self, parts: Sequence[tuple[bytes, int] | None]) -> NDArray[np.float32] | ModelError:
        try:
            return mean_over_ranks(parts, self._heads)
        except ValueError as error:
            return ModelError(f"an attention row is missing: {error}")
