"""Continue training from a finished checkpoint.

``python -m eval.demo_model.take_up --checkpoint demo/vlm_collab_demo/demo_model --out runs/demo``

Writes an output folder in which every stage up to ``--stage`` counts as finished, so that the
training command continues with the next one. A checkpoint holds bfloat16 weights without optimiser
state and without the tower's read-out, so the result differs from an uninterrupted run: the
read-out starts from random weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig

from eval.demo_model.build import build_model
from eval.demo_model.export import FOLDER, hub_name
from eval.demo_model.recipe import Recipe, load_recipe
from eval.demo_model.tower import TowerWithHeads


def model_state(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Load the checkpoint's weights in float32 under transformers' names."""
    saved = load_file(folder / "model.safetensors")
    names = build_model(recipe).state_dict()
    return {name: saved[hub_name(name)].float() for name in names}


def tower_state(recipe: Recipe, state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights of a tower stage: the checkpoint's tower with a new read-out."""
    torch.manual_seed(seed)
    model = TowerWithHeads(CLIPVisionConfig(**recipe.vision))
    prefix = "model.vision_tower."
    model.tower.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return dict(model.state_dict())


def take_up(recipe: Recipe, folder: Path, stage: str, out: Path) -> None:
    """Write the output folder.

    Raises:
        ValueError: the recipe has no such stage, or the folder already contains a run.
    """
    last = recipe.stages.index(recipe.stage(stage))
    if (out / "curve.jsonl").exists() or any(out.glob("*.pt")):
        raise ValueError(f"{out} already holds a run; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    state = model_state(recipe, folder)
    for entry in recipe.stages[: last + 1]:
        own = tower_state(recipe, state, entry.seed) if entry.kind == "tower" else state
        torch.save({"model": own}, out / f"{entry.name}.pt")
    points = json.loads((folder / "training-curve.json").read_text())
    (out / "curve.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=FOLDER)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--stage", help="last finished stage (default: the curve's last)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    stage = options.stage
    if stage is None:
        curve = json.loads((options.checkpoint / "training-curve.json").read_text())
        stage = curve[-1]["stage"]
    try:
        take_up(load_recipe(options.recipe), options.checkpoint, stage, options.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.out}: training continues after {stage}")


if __name__ == "__main__":
    main()
