"""Train the demo model: ``python -m eval.demo_model.train --recipe R.yaml --out runs/demo``.

Runs the recipe's stages in order. The same command continues a stopped run: it skips finished
stages and continues an unfinished one from its last checkpoint. The learning curve is written as
JSON lines to ``curve.jsonl`` in the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from eval.demo_model import optim
from eval.demo_model.decoder import train_decoder
from eval.demo_model.loop import TrainingRun, drawn_ahead, train_loop
from eval.demo_model.recipe import Recipe, TrainingStage, load_recipe
from eval.demo_model.tower import TowerWithHeads, to_pixels, tower_loss, whitening_filters
from eval.demo_model.views import TowerBatch, tower_batch


def train_tower(run: TrainingRun, recipe: Recipe, stage: TrainingStage) -> None:
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
    run = TrainingRun(options.out, torch.device(options.device), options.workers)
    for stage in recipe.stages:
        if not run.finished(stage.name).exists():
            if stage.kind == "tower":
                train_tower(run, recipe, stage)
            else:
                train_decoder(run, recipe, stage)
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()
