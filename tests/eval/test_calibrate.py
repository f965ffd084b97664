"""`vlm-collab calibrate`, and what `serve --calibration` makes of its file."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import server_plugin.cli
from edge_client.cli import main
from eval.baselines.from_records import decided
from eval.calibrate.choose import for_bytes, for_loss, for_rate, setting_of
from eval.calibrate.layers import Layer, best_layer, measure_layers
from eval.harness.curves import Setting, curve
from eval.harness.loading import ModelOptions
from eval.harness.runs import Run
from eval.tasks import open_task
from server_plugin.calibration import Calibration, load_calibration
from server_plugin.models import open_model
from tests.eval.test_sweep import rows, saved
from tests.support.rows import row, run_of
from vlm_collab.errors import ConfigError
from vlm_collab.policy import Aggregate, Metric


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of(rows(200))


def sent(run: Run, found: Calibration) -> float:
    assert found.eta is not None
    setting = Setting(found.metric, found.aggregate, found.k)
    return float(np.mean([decided(setting.policy(found.eta), r) for r in run.records]))


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("rate", [0.05, 0.25, 0.6, 1.0])
def test_a_rate_is_met_from_below(run: Run, metric: Metric, rate: float) -> None:
    found = for_rate(run, Setting(metric), rate)
    assert found.expected["rate"] == pytest.approx(sent(run, found))
    above = curve(run, Setting(metric)).rate
    assert found.expected["rate"] == max(r for r in above if r <= rate)
    low, high = found.expected["rate_interval_95"]
    assert low <= found.expected["rate"] <= high


def test_a_rate_that_no_threshold_reaches_is_told(run: Run) -> None:
    assert for_rate(run, Setting(), 0.0).expected["rate"] == 0.0
    with pytest.raises(ConfigError, match="no threshold of margin/full sends fewer"):
        for_rate(run, Setting(Metric.MARGIN), 0.0)  # some answers have a margin of 0


def test_a_budget_of_bytes_buys_the_most_accuracy(run: Run) -> None:
    drawn = curve(run, Setting())
    budget = float(drawn.bytes_up[len(drawn.sent) // 2])
    found = for_bytes(run, Setting(), budget)
    assert found.expected["bytes_up"] <= budget
    assert found.expected["accuracy"] == drawn.accuracy[drawn.bytes_up <= budget].max()
    assert sent(run, found) == found.expected["rate"]
    with pytest.raises(ConfigError, match="views alone take"):
        for_bytes(run, Setting(), 10.0)


def test_the_loss_bound_is_applied_to_the_run(run: Run) -> None:
    # Sure answers lose nothing, unsure ones all.
    made = [row(i, float(i % 2), 1.0, bits=2.0 - i % 2, image_id=f"i{i}") for i in range(800)]
    found = for_loss(run_of(made), Setting(), 0.02, 0.95)
    assert found.eta is not None
    # The sequence has sixteen thresholds for each doubling: the one below 2 bits.
    assert 1.9 < found.eta <= 2.0
    assert found.expected["rate"] == 0.5 == sent(run_of(made), found)
    assert (found.expected["accuracy"], found.made["pictures"]) == (1.0, 800)
    few = for_loss(run_of(made[:20]), Setting(), 0.02, 0.95)
    assert (few.eta, few.expected["rate"]) == (0.0, 1.0)
    assert "every question is sent" in few.made["note"]


def test_what_is_measured_is_the_presets_unless_said_otherwise(run: Run) -> None:
    assert setting_of(run, None, None, None) == Setting(k=5)
    chosen = setting_of(run, "margin", "first_k", 3)
    assert chosen == Setting(Metric.MARGIN, Aggregate.FIRST_K, 3)
    preset = {**run.provenance["model"]["preset"], "include_end": False}
    model = {**run.provenance["model"], "preset": preset}
    other = replace(run, provenance={**run.provenance, "model": model})
    assert not setting_of(other, None, None, None).include_end
    with pytest.raises(ConfigError, match="--k needs"):
        setting_of(run, None, None, 3)
    with pytest.raises(ConfigError, match="there are: min_entropy"):
        setting_of(run, "doubt", None, None)


# --- layers ---------------------------------------------------------------------------------


def test_layers_are_measured_by_the_regions_that_they_lead_to() -> None:
    task = open_task("signs", split="val", limit=6)
    options = ModelOptions(name="demo", device="cpu", dtype="float32")
    made, name = asyncio.run(measure_layers(task, options, [0, 1]))
    assert name == "demo"
    assert [one.layer for one in made] == [0, 1]
    boxed = sum(task[index].true_box is not None for index in range(6))
    assert {one.samples for one in made} == {boxed}
    # The demo model's preset reads layer 1, chosen on other scenes.
    assert best_layer(made).layer == 1
    assert made[1].covered > made[0].covered


def test_on_ties_the_first_layer_wins() -> None:
    same = [Layer(layer=n, covered=0.5, whole=0.1 * n, samples=3) for n in (2, 0, 1)]
    assert best_layer(same).layer == 0


# --- the file -------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    told = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, told.out, told.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", rows(100), split="val")


def test_what_calibrate_writes_serve_reads(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where.py", "calibrate", "as it was called"])
    path = tmp_path / "deep" / "calibration.yaml"
    options = ("--metric", "entropy", "--aggregate", "first_k", "--k", "2", "--out", str(path))
    code, out, err = call(capsys, "calibrate", str(folder), "--target-rate", "0.3", *options)
    assert (code, err) == (0, "")
    assert "entropy/first_2" in out
    found = load_calibration(path)
    written = path.read_bytes()
    assert (found.metric, found.aggregate, found.k) == (Metric.ENTROPY, Aggregate.FIRST_K, 2)
    assert found.made["split"] == "val"
    assert found.made["command"] == ["vlm-collab", "calibrate", "as it was called"]
    _, preset = open_model("demo", device="cpu", dtype="float32", **found.overrides())
    policy = preset.policy()
    assert (policy.metric, policy.aggregate, policy.k) == (found.metric, found.aggregate, 2)
    assert (policy.eta, preset.layer) == (found.eta, 1)
    # Options may stand before the run; the same run gives the same file.
    code, _, _ = call(capsys, "calibrate", "--target-rate", "0.3", str(folder), *options)
    assert code == 0
    assert path.read_bytes() == written


def served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[dict[str, Any], str]:
    """Options of the model with which `serve` would start, and what it says."""
    seen: dict[str, Any] = {}

    async def start(model: str, config: object, *, model_options: Any, **rest: object) -> None:
        seen.update({key: value for key, value in model_options.items() if value is not None})

    monkeypatch.setattr(server_plugin.cli, "_serve", start)
    _, _, err = call(capsys, "serve", *arguments)
    return seen, err


def write(path: Path, **fields: Any) -> str:
    told = {"format": 1, "model": "demo", "metric": "margin", "eta": 0.5, "layer": 2, **fields}
    path.write_text(yaml.safe_dump(told))
    return str(path)


def test_serve_takes_a_calibration_and_a_users_own_options_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "c.yaml")
    given = ("--calibration", path)
    seen, _ = served(monkeypatch, capsys, *given)
    assert {key: seen[key] for key in ("metric", "aggregate", "eta", "layer")} == {
        "metric": "margin", "aggregate": "full", "eta": 0.5, "layer": 2,
    }  # fmt: skip
    seen, _ = served(monkeypatch, capsys, *given, "--eta", "0.25", "--layer", "3")
    assert (seen["metric"], seen["eta"], seen["layer"]) == ("margin", 0.25, 3)
    # A threshold goes with its metric: another metric needs another threshold.
    seen, _ = served(monkeypatch, capsys, *given, "--metric", "entropy", "--eta", "1")
    assert (seen["metric"], seen["eta"], seen["layer"]) == ("entropy", 1.0, 2)
    assert "aggregate" not in seen
    seen, err = served(monkeypatch, capsys, *given, "--metric", "entropy")
    assert (seen, "for its own metric" in err) == ({}, True)


def test_a_calibration_of_the_layer_alone_leaves_the_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", eta=None)
    assert load_calibration(Path(path)).overrides() == {"layer": 2}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model": "other"}, "the calibration is for other, not for demo"),
        ({"eta": 2.0}, "eta of a margin must be between 0 and 1"),
        ({"eta": "much"}, "Expected `float | null`"),
        ({"format": 2}, "Invalid"),
        ({"doubt": 1}, "unknown field `doubt`"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    fields: dict[str, Any],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "c.yaml", **fields)
    seen, err = served(monkeypatch, capsys, "--calibration", path)
    assert not seen
    assert line in err
    assert len(err.splitlines()) == 1


def test_no_yaml_and_no_file_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: [")
    assert "is not YAML" in served(monkeypatch, capsys, "--calibration", str(path))[1]
    missing = str(tmp_path / "none.yaml")
    assert "cannot be read" in served(monkeypatch, capsys, "--calibration", missing)[1]


def test_a_copy_of_the_model_in_another_folder_is_the_same_model() -> None:
    found = Calibration(format=1, model="llava-hf/llava-1.5-7b-hf", eta=0.5)
    found.require_model("/models/llava-1.5-7b-hf")
    with pytest.raises(ConfigError, match="not for demo"):
        found.require_model("demo")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say one of --target-rate"),
        (["--target-rate", "0.3", "--max-bytes", "9"], "say one of --target-rate"),
        (["--target-rate", "2"], "must be between 0 and 1"),
        (["--max-accuracy-loss", "0"], "largest loss must be"),
        (["--max-accuracy-loss", "0.1", "--confidence", "1"], "confidence must be"),
        (["--target-rate", "0.3", "--metric", "doubt"], "'doubt' is not a valid Metric"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "calibrate", str(folder), *arguments)
    assert code == 2
    assert line in err
    assert len(err.splitlines()) == 1
