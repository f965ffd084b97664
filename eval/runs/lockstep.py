"""Lockstep execution of a group of questions, so that runs repeat bit by bit.

A backend batches the operations that are waiting at the moment, and results of different batches
differ in their last bits. Here, the questions of a group take each step together: a step begins
once every unfinished question of the group has reached it. So batches are the same in every run,
whatever the load of the machine, and even if the run was interrupted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from server_plugin.backends.base import (
    Backend,
    Generation,
    GenerationRequest,
    ModelInfo,
    RelativeAttention,
    StopRule,
    TextSink,
    View,
)


@runtime_checkable
class DelaysBatches(Protocol):
    """A backend that can delay its batches until a whole step is queued.

    A backend without it either runs one operation at a time or does not promise repeatable runs.
    """

    def together(self) -> AbstractContextManager[None]: ...


@dataclass(slots=True, eq=False)
class _Step:
    """An operation that a question waits for."""

    place: int
    call: Callable[[], Awaitable[Any]]
    result: asyncio.Future[Any]


class Lockstep:
    """A group of questions that run in lockstep.

    Args:
        backend: the backend that runs them.
        size: number of questions.

    Attributes:
        members: the backend of each question. Each must `leave` in the end.
    """

    def __init__(self, backend: Backend, size: int) -> None:
        self.backend = backend
        self.members = [Member(self, place) for place in range(size)]
        self._running = size
        self._waiting: list[_Step] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, place: int, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run an operation once all other questions have one waiting, and return its result."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Step(place, call, result))
        self._go_on()
        return await result

    def leave(self) -> None:
        """Remove a finished question from the group."""
        self._running -= 1
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting and len(self._waiting) >= self._running:
            steps = sorted(self._waiting, key=lambda step: step.place)
            self._waiting = []
            task = asyncio.create_task(self._take(steps))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, steps: Sequence[_Step]) -> None:
        if not isinstance(self.backend, DelaysBatches):
            await asyncio.gather(*(_settle(step) for step in steps))
            return
        with self.backend.together():
            tasks = [asyncio.create_task(_settle(step)) for step in steps]
            # Each task runs until it waits for the model. Then all are queued, in this order.
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)


async def _settle(step: _Step) -> None:
    try:
        outcome = await step.call()
    # Any error goes to the question that waits for the result.
    except Exception as error:
        if not step.result.done():
            step.result.set_exception(error)
    else:
        if not step.result.done():
            step.result.set_result(outcome)


@dataclass(slots=True, eq=False)
class Member:
    """The backend of one question in a group; a `server_plugin.backends.base.Backend`.

    Attributes:
        seconds: duration of each operation in s, by its name. Each operation counts the whole
            time of its batch.
        error: the error of the operation that failed; None if none did.
    """

    group: Lockstep
    place: int
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def info(self) -> ModelInfo:
        return self.group.backend.info

    def leave(self) -> None:
        """Mark the question as finished."""
        self.group.leave()

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        self.group.backend.check_question(request, images)

    async def open_view(self, *images: Image) -> View:
        view: View = await self._step("open_view", lambda: self.group.backend.open_view(*images))
        return view

    async def first_pass(
        self,
        view: View,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        generation: Generation = await self._step(
            "first_pass",
            lambda: self.group.backend.first_pass(view, request, stop=stop, on_text=on_text),
        )
        return generation

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        attention: RelativeAttention = await self._step(
            "relative_attention", lambda: self.group.backend.relative_attention(view, first)
        )
        return attention

    async def second_pass(
        self,
        view: View,
        region: Image,
        request: GenerationRequest,
        *,
        picture: int = 0,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        generation: Generation = await self._step(
            "second_pass",
            lambda: self.group.backend.second_pass(
                view, region, request, picture=picture, stop=stop, on_text=on_text
            ),
        )
        return generation

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        generation: Generation = await self._step(
            "text_pass",
            lambda: self.group.backend.text_pass(request, stop=stop, on_text=on_text),
        )
        return generation

    async def release(self, view: View) -> None:
        await self.group.backend.release(view)

    async def warm_up(self) -> None:
        await self.group.backend.warm_up()

    async def close(self) -> None:
        await self.group.backend.close()

    async def _step(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        async def timed() -> Any:
            begin = time.perf_counter()
            try:
                result = await call()
            except Exception as error:
                self.error = error
                raise
            self.seconds[name] = time.perf_counter() - begin
            return result

        return await self.group.step(self.place, timed)
