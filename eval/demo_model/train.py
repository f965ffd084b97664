"""Train the demo model: ``python -m eval.demo_model.train --recipe R.yaml --out runs/demo``.

Runs the recipe's stages in order. Running the same command again goes on where the last run
stopped: finished stages are skipped, an unfinished one continues from its last checkpoint. The
learning curve is written as JSON lines to ``curve.jsonl`` in the output folder.
"""

from __future__ import annotations

import argparse
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
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import CLIPVisionConfig

from eval.demo_model import optim
from eval.demo_model.recipe import Recipe, Stage, load_recipe
from eval.demo_model.tower import TowerWithHeads, to_pixels, tower_loss, whitening_filters
from eval.demo_model.views import TowerBatch, tower_batch

_CHUNK = 24  # batches drawn ahead by all workers before the training thread goes on
_SAVE_EVERY_S = 60.0
T = TypeVar("T")


def drawn_ahead(
    pool: Pool, make: Callable[..., T], arguments: list[tuple[Any, ...]]
) -> Iterator[T]:
    """Results of ``make`` in order, drawn in chunks.

    Drawing and training take turns on the cores: side by side on two cores they cost each other
    far more than the turns do.
    """
    for first in range(0, len(arguments), _CHUNK):
        yield from pool.starmap(make, arguments[first : first + _CHUNK], chunksize=1)


class Run:
    """The output folder: checkpoints, finished stages and the learning curve."""

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
        """Where a finished stage leaves its weights."""
        return self.out / f"{name}.pt"

    def unfinished(self, name: str) -> Path:
        """Where a running stage keeps its state."""
        return self.out / f"{name}.part.pt"

    def log(self, **values: Any) -> None:
        """Append one line to the learning curve."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with (self.out / "curve.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")

    def forget(self, stage: str, after: int) -> None:
        """Drop curve lines of steps that are about to be run again."""
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
        """Write a checkpoint so that a kill at any moment leaves a whole one behind."""
        partial = path.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        return state


def _as_text(stage: Stage) -> str:
    return msgspec.json.encode(stage).decode()


def train_loop(
    run: Run,
    stage: Stage,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Any]],
    loss_of: Callable[[Any], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train one stage to its end, with checkpoints, a progress bar and a curve."""
    step, before = 0, 0.0
    if run.unfinished(stage.name).exists():
        state = run.load(run.unfinished(stage.name))
        if state.get("recipe", _as_text(stage)) != _as_text(stage):
            raise ValueError(
                f"the recipe of {stage.name} changed since it was begun; delete "
                f"{run.unfinished(stage.name)} to begin it again"
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


def train_tower(run: Run, recipe: Recipe, stage: Stage) -> None:
    """Train the vision tower by dense patch labels."""
    torch.manual_seed(stage.seed)
    config = CLIPVisionConfig(**recipe.vision)
    model = TowerWithHeads(config)
    if stage.start_from:
        model.load_state_dict(run.load(run.finished(stage.start_from[0]))["model"])
    else:
        sample = tower_batch(stage.seed + 500, 0, 512, *stage.progress(stage.steps)).views
        filters = whitening_filters(sample, recipe.vision["patch_size"], config.hidden_size)
        for name, parameter in model.tower.named_parameters():
            if name.endswith("patch_embedding.weight"):
                parameter.data.copy_(filters)
    model.to(run.device)
    optimisers = optim.make_optimisers([model], [model.hidden()], stage.learning_rate)

    def batches(first: int) -> Iterator[TowerBatch]:
        return drawn_ahead(
            run.pool,
            tower_batch,
            [(stage.seed, s, stage.batch, *stage.progress(s)) for s in range(first, stage.steps)],
        )

    def loss_of(batch: TowerBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return tower_loss(model(to_pixels(batch.views, run.device)), batch)

    held_out = tower_batch(stage.seed, 0, 256, *stage.progress(stage.steps), "val")

    def evaluate() -> dict[str, float]:
        return {f"val_{k}": v for k, v in loss_of(held_out)[1].items()}

    train_loop(run, stage, model, optimisers, batches, loss_of, evaluate)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", help="stop after this stage")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    parser.add_argument("--workers", type=int, default=2, help="drawing processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = load_recipe(options.recipe)
        if options.until:
            recipe.stage(options.until)
    except ValueError as error:
        parser.error(str(error))
    run = Run(options.out, torch.device(options.device), options.workers)
    for stage in recipe.stages:
        if not run.finished(stage.name).exists():
            if stage.kind == "tower":
                train_tower(run, recipe, stage)
            else:
                from eval.demo_model.decoder import train_decoder

                train_decoder(run, recipe, stage)
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()
