"""Questions of a group through a backend step by step, so that runs repeat bit by bit.

A backend batches what waits. Which operations that are is a matter of timing, and sums over padded
batches differ in their last bits from those over others. Here, the questions of a group take each
step together: a step begins once every question of the group that is still under way has come to
it. Batches are then the same in every run, however busy the machine is, whatever ran before, and
whether the run was interrupted.
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
class Gathers(Protocol):
    """A backend whose batches depend on timing, and that can be made to wait for a whole step.

    One without it either works on one operation at a time or makes no such promise.
    """

    def together(self) -> AbstractContextManager[None]: ...


@dataclass(slots=True, eq=False)
class _Step:
    """What one question waits for."""

    place: int
    call: Callable[[], Awaitable[Any]]
    result: asyncio.Future[Any]


class Lockstep:
    """A group of questions under way.

    Args:
        backend: what they are asked of.
        size: questions of the group.

    Attributes:
        members: for each question, the backend that it uses. Each must `leave` in the end.
    """

    def __init__(self, backend: Backend, size: int) -> None:
        self.backend = backend
        self.members = [Member(self, place) for place in range(size)]
        self._under_way = size
        self._waiting: list[_Step] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, place: int, call: Callable[[], Awaitable[Any]]) -> Any:
        """Wait for the others, then do it."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Step(place, call, result))
        self._go_on()
        return await result

    def leave(self) -> None:
        """One question less."""
        self._under_way -= 1
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting and len(self._waiting) >= self._under_way:
            steps = sorted(self._waiting, key=lambda step: step.place)
            self._waiting = []
            task = asyncio.create_task(self._take(steps))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, steps: Sequence[_Step]) -> None:
        if not isinstance(self.backend, Gathers):
            await asyncio.gather(*(_settle(step) for step in steps))
            return
        with self.backend.together():
            tasks = [asyncio.create_task(_settle(step)) for step in steps]
            # Each task runs up to its first wait, which is for the model: all are queued then,
            # in this order.
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)


async def _settle(step: _Step) -> None:
    try:
        outcome = await step.call()
    # Whatever it is belongs to the question that waits for it.
    except Exception as error:
        if not step.result.done():
            step.result.set_exception(error)
    else:
        if not step.result.done():
            step.result.set_result(outcome)


@dataclass(slots=True, eq=False)
class Member:
    """The backend as one question of a group sees it; see `server_plugin.backends.base.Backend`.

    Attributes:
        seconds: time of each operation, by its name, in s. Operations that ran in one batch each
            count its whole time.
        error: what an operation failed of; None if none did.
    """

    group: Lockstep
    place: int
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def info(self) -> ModelInfo:
        return self.group.backend.info

    def leave(self) -> None:
        """The question is over."""
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
        made: Generation = await self._step(
            "first_pass",
            lambda: self.group.backend.first_pass(view, request, stop=stop, on_text=on_text),
        )
        return made

    async def relative_attention(self, view: View, first: Generation) -> RelativeAttention:
        made: RelativeAttention = await self._step(
            "relative_attention", lambda: self.group.backend.relative_attention(view, first)
        )
        return made

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
        made: Generation = await self._step(
            "second_pass",
            lambda: self.group.backend.second_pass(
                view, region, request, picture=picture, stop=stop, on_text=on_text
            ),
        )
        return made

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        made: Generation = await self._step(
            "text_pass",
            lambda: self.group.backend.text_pass(request, stop=stop, on_text=on_text),
        )
        return made

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
                made = await call()
            except Exception as error:
                self.error = error
                raise
            self.seconds[name] = time.perf_counter() - begin
            return made

        return await self.group.step(self.place, timed)
