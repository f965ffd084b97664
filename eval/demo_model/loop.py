"""The training loop that every stage shares: output folder, drawing processes, checkpoints."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn
from tqdm import tqdm

from eval.demo_model import optim
from eval.demo_model.recipe import TrainingStage

_CHUNK = 24  # batches that the workers draw before training continues
_SAVE_EVERY_S = 60.0
T = TypeVar("T")


def drawn_ahead(
    pool: Pool, make: Callable[..., T], arguments: list[tuple[Any, ...]]
) -> Iterator[T]:
    """Results of ``make`` in order, computed in chunks.

    Drawing and training alternate: on two cores, both at once slow each other down by far more.
    """
    for first in range(0, len(arguments), _CHUNK):
        yield from pool.starmap(make, arguments[first : first + _CHUNK], chunksize=1)


class TrainingRun:
    """A training run's output folder: checkpoints, finished stages and the learning curve."""

    def __init__(self, out: Path, device: torch.device, workers: int) -> None:
        self.out = out
        self.device = device
        self.out.mkdir(parents=True, exist_ok=True)
        self.workers = workers

    @functools.cached_property
    def pool(self) -> Pool:
        """The drawing processes, started when first needed."""
        return multiprocessing.get_context("spawn").Pool(self.workers)

    def finished(self, name: str) -> Path:
        """Path of a finished stage's weights."""
        return self.out / f"{name}.pt"

    def unfinished(self, name: str) -> Path:
        """Path of an unfinished stage's state."""
        return self.out / f"{name}.part.pt"

    def log(self, **values: Any) -> None:
        """Append one line to the learning curve."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with (self.out / "curve.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")

    def forget(self, stage: str, after: int) -> None:
        """Remove the curve's lines of steps that will run again."""
        path = self.out / "curve.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        points = [json.loads(line) for line in lines]
        kept = [
            line
            for line, point in zip(lines, points, strict=True)
            if point["stage"] != stage or point["step"] <= after
        ]
        path.write_text("".join(f"{line}\n" for line in kept))

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically, so that a killed run leaves a complete file."""
        partial = path.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        return state


def _as_text(stage: TrainingStage) -> str:
    return msgspec.json.encode(stage).decode()


def train_loop(
    run: TrainingRun,
    stage: TrainingStage,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Any]],
    loss_of: Callable[[Any], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train one stage, with checkpoints, a progress bar and a learning curve."""
    step, before = 0, 0.0
    if run.unfinished(stage.name).exists():
        state = run.load(run.unfinished(stage.name))
        if state.get("recipe", _as_text(stage)) != _as_text(stage):
            raise ValueError(
                f"the recipe of {stage.name} changed after training began; delete "
                f"{run.unfinished(stage.name)} to start the stage again"
            )
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, before = int(state["step"]), float(state["seconds"])
    run.forget(stage.name, step)
    started = saved_at = time.monotonic()
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, mininterval=10)
    for batch in batches(step):
        optim.set_rate(optimisers, optim.rate_at(step, stage.steps, stage.learning_rate))
        model.train()
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            loss, parts = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        now = time.monotonic()
        seconds = before + now - started
        if step % 25 == 0:
            run.log(
                stage=stage.name, step=step, seconds=seconds, loss=float(loss.detach()), **parts
            )
        if step % 150 == 0 or step == stage.steps:
            model.eval()
            with torch.no_grad():
                run.log(stage=stage.name, step=step, seconds=seconds, **evaluate())
        if now - saved_at > _SAVE_EVERY_S:
            saved_at = now
            run.save(
                run.unfinished(stage.name),
                {
                    "model": model.state_dict(),
                    "optimisers": [o.state_dict() for o in optimisers],
                    "step": step,
                    "seconds": seconds,
                    "recipe": _as_text(stage),
                },
            )
    bar.close()
    run.save(run.finished(stage.name), {"model": model.state_dict()})
    run.unfinished(stage.name).unlink(missing_ok=True)
