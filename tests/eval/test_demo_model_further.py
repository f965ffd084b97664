"""Training can continue from a finished checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.demo_model.build import build_model
from eval.demo_model.decoder import load_tower
from eval.demo_model.export import FOLDER, write_checkpoint
from eval.demo_model.recipe import load_recipe
from eval.demo_model.take_up import take_up
from eval.demo_model.workers import load_model

RECIPE = Path(__file__).parents[2] / "eval" / "demo_model" / "recipe.yaml"


def test_training_continues_with_all_weights_of_a_checkpoint(tmp_path: Path) -> None:
    recipe, out = load_recipe(RECIPE), tmp_path / "run"
    last = recipe.stages[-1].name
    take_up(recipe, FOLDER, last, out)
    assert {path.stem for path in out.glob("*.pt")} == {stage.name for stage in recipe.stages}
    lines = (out / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(
        (FOLDER / "training-curve.json").read_text()
    )
    # Exporting it gives the same checkpoint; a tower stage has the same tower.
    state = torch.load(out / f"{last}.pt", weights_only=True)["model"]
    write_checkpoint(recipe, state, tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (FOLDER / weights).read_bytes()
    model = build_model(recipe)
    load_tower(model, torch.load(out / "tower-3.pt", weights_only=True)["model"])
    committed = load_model().model.vision_tower.state_dict()
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, committed[name]), name


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text("")
    with pytest.raises(ValueError, match="already holds a run"):
        take_up(load_recipe(RECIPE), FOLDER, "tower-1", tmp_path)


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tower-9'"):
        take_up(load_recipe(RECIPE), FOLDER, "tower-9", tmp_path / "run")
