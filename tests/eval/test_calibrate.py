"""`vlm-collab calibrate`, and how `serve --calibration` uses its file."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

import server_plugin.cli.serve
from edge_client.cli.main import main
from eval.analysis.baselines import retransmits
from eval.analysis.boxes import covered
from eval.analysis.curves import Criterion, curve
from eval.analysis.run import Run
from eval.analysis.splits import reported_split
from eval.analysis.thresholds import for_bytes, for_loss, for_rate, setting_of
from eval.analysis.trace import expanded
from eval.report import table_format, tables
from eval.report.demo import COMMITTED
from eval.report.inputs import sort_runs
from eval.report.write import RESULTS
from eval.runs.layers import (
    Layer,
    LayerRegion,
    best_layer,
    by_layer,
    measure_layers,
    read_regions,
)
from eval.runs.loading import ModelOptions
from eval.tasks import open_task
from eval.tasks.catalogue import TASKS
from server_plugin.backends.open import open_model
from server_plugin.models.calibration import Calibration, load_calibration
from tests.eval.test_sweep import rows, saved
from tests.support.report_runs import answers
from tests.support.rows import row, run_of
from tests.support.tiny_qwen import save_tiny_qwen
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric

ROOT = Path(__file__).resolve().parents[2]
BOX = [0, 0, 4, 3]


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of(rows(200))


def sent(run: Run, found: Calibration) -> float:
    assert found.eta is not None
    setting = Criterion(found.metric, found.aggregate, found.k)
    return float(np.mean([retransmits(setting.policy(found.eta), r) for r in run.records]))


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("rate", [0.05, 0.25, 0.6, 1.0])
def test_the_rate_is_the_largest_up_to_the_target(run: Run, metric: Metric, rate: float) -> None:
    found = for_rate(run, Criterion(metric), rate)
    assert found.expected["rate"] == pytest.approx(sent(run, found))
    above = curve(run, Criterion(metric)).rate
    assert found.expected["rate"] == max(r for r in above if r <= rate)
    low, high = found.expected["rate_interval_95"]
    assert low <= found.expected["rate"] <= high


def test_a_rate_that_no_threshold_reaches_is_refused(run: Run) -> None:
    assert for_rate(run, Criterion(), 0.0).expected["rate"] == 0.0
    with pytest.raises(ConfigError, match="no threshold of margin/full sends fewer"):
        for_rate(run, Criterion(Metric.MARGIN), 0.0)  # some answers have a margin of 0


def test_a_byte_budget_gives_the_most_accurate_threshold_within_it(run: Run) -> None:
    drawn = curve(run, Criterion())
    budget = float(drawn.bytes_up[len(drawn.sent) // 2])
    found = for_bytes(run, Criterion(), budget)
    assert found.expected["bytes_up"] <= budget
    assert found.expected["accuracy"] == drawn.accuracy[drawn.bytes_up <= budget].max()
    assert sent(run, found) == found.expected["rate"]
    with pytest.raises(ConfigError, match="views alone take"):
        for_bytes(run, Criterion(), 10.0)


def test_the_loss_bound_is_applied_to_the_run(run: Run) -> None:
    # Answers of low uncertainty lose nothing; all others are wrong at first, right at second.
    records = [row(i, float(i % 2), 1.0, bits=2.0 - i % 2, image_id=f"i{i}") for i in range(800)]
    found = for_loss(run_of(records), Criterion(), 0.02, 0.95)
    assert found.eta is not None
    # The sequence has sixteen thresholds for each doubling: the one below 2 bits.
    assert 1.9 < found.eta <= 2.0
    assert found.expected["rate"] == 0.5 == sent(run_of(records), found)
    assert (found.expected["accuracy"], found.made["pictures"]) == (1.0, 800)
    assert found.expected["loss"] == found.expected["loss_by_picture"] == 0.0
    few = for_loss(run_of(records[:20]), Criterion(), 0.02, 0.95)
    assert (few.eta, few.expected["rate"]) == (0.0, 1.0)
    assert "every question is sent" in few.made["note"]


def test_a_bound_on_the_loss_says_which_mean_it_bounds() -> None:
    # One picture has five questions, all lost; the others have one each, and lose nothing.
    records = [row(i, 1.0, 1.0, image_id=f"i{i}") for i in range(400)]
    records += [row(400 + i, 0.0, 1.0, image_id="i0") for i in range(4)]
    records[0] = row(0, 0.0, 1.0, image_id="i0")
    val = run_of(records, task={"split": "val"})
    once = for_loss(val, Criterion(), 0.02, 0.95)
    assert once.made["bound_on"].startswith("mean over pictures")
    assert (once.made["most_per_picture"], once.made["questions_about_one"]) == (1, [1, 5])
    assert "pictures have 1 to 5 questions here, and each counts once" in once.made["note"]
    assert once.expected["loss"] == pytest.approx(5 / 404)
    assert once.expected["loss_by_picture"] == pytest.approx(1 / 400)
    known = for_loss(val, Criterion(), 0.1, 0.95, most_per_picture=6)
    assert known.made["bound_on"].startswith("mean loss over questions")
    assert "note" not in known.made
    capped = for_loss(val, Criterion(), 0.1, 0.95, most_per_picture=3)
    assert "1 of 400 pictures have more than 3 questions and count as 3" in capped.made["note"]
    # If all pictures have the same number of questions, the two means are equal.
    even = for_loss(run_of(rows(200), task={"split": "val"}), Criterion(), 0.1, 0.95)
    assert even.made["questions_about_one"] == [2, 2]
    assert "note" not in even.made


@pytest.mark.parametrize(
    ("task", "apart", "warning"),
    [
        ({"limit": 404, "samples": 404}, True, "--limit 404 took questions, not whole pictures"),
        ({"limit": 404, "samples": 404}, False, None),  # only the last picture may be incomplete
        ({"limit": 500, "samples": 404}, True, None),  # the limit cuts nothing
        ({"limit": None, "samples": 404}, True, None),
        ({"limit": None, "samples": 407}, False, "3 samples have no row"),
    ],
)
def test_a_note_warns_of_pictures_that_may_lack_questions(
    task: dict[str, Any], apart: bool, warning: str | None
) -> None:
    pictures = [0] * 4 + [*range(400)]
    if apart:
        pictures = [*range(400)] + [0] * 4
    records = [row(i, 1.0, 1.0, image_id=f"i{one}") for i, one in enumerate(pictures)]
    found = for_loss(run_of(records, task={"split": "val", **task}), Criterion(), 0.05, 0.95)
    note = found.made["note"]
    assert ("the bound holds only for whole pictures" in note) == (warning is not None)
    if warning is not None:
        assert warning in note
    # No note if all pictures have the same number of questions.
    even = [replace(r, image_id=f"i{r.index // 2}") for r in records]
    found = for_loss(run_of(even, task={"split": "val", **task}), Criterion(), 0.05, 0.95)
    assert "note" not in found.made


def test_the_reported_split_is_the_one_that_is_opened_and_documented() -> None:
    assert reported_split("signs") == open_task("signs").split
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `")]
    documented = {
        name.strip(" `"): splits.split(",")[0].split()[0] for name, _, splits in lines[:7]
    }
    assert documented.pop("aokvqa_mc") == "the"  # the same
    assert set(documented) | {"aokvqa_mc"} == set(TASKS)
    assert {name: reported_split(name) for name in documented} == documented
    assert reported_split("aokvqa_mc") == documented["aokvqa"]
    assert reported_split("one of somebody's own") is None


@pytest.mark.parametrize(
    ("task", "split", "warning"),
    [
        ("signs", "test", "test is the split of signs that is reported"),
        ("textvqa", "validation", "validation is the split of textvqa that is reported"),
        ("pope", "random", "random shows pictures of the split of pope that is reported"),
        ("textvqa", "train", None),
        ("signs", "val", None),
    ],
)
def test_a_note_warns_against_choosing_on_the_reported_split(
    task: str, split: str, warning: str | None
) -> None:
    run = run_of(rows(200), task={"name": task, "split": split})
    for found in (
        for_rate(run, Criterion(), 0.3),
        for_bytes(run, Criterion(), 1e6),
        for_loss(run, Criterion(), 0.1, 0.95),
    ):
        assert found.made.get("note", "").startswith(warning or "")
        assert ("note" in found.made) == (warning is not None)


def test_the_criterion_is_the_preset_s_by_default(run: Run) -> None:
    assert setting_of(run, None, None, None) == Criterion(k=5)
    chosen = setting_of(run, "margin", "first_k", 3)
    assert chosen == Criterion(Metric.MARGIN, Aggregate.FIRST_K, 3)
    preset = {**run.provenance["model"]["preset"], "include_end": False}
    model = {**run.provenance["model"], "preset": preset}
    other = replace(run, provenance={**run.provenance, "model": model})
    assert not setting_of(other, None, None, None).include_end
    with pytest.raises(ConfigError, match="--k needs"):
        setting_of(run, None, None, 3)
    with pytest.raises(ConfigError, match="there are: min_entropy"):
        setting_of(run, "doubt", None, None)


# --- layers ---------------------------------------------------------------------------------


def test_layers_are_measured_by_their_regions() -> None:
    task = open_task("signs", split="val", limit=6)
    options = ModelOptions(name="demo", device="cpu", dtype="float32")
    regions, name = asyncio.run(measure_layers(task, options, [0, 1]))
    assert name == "demo"
    results = by_layer(regions)
    assert [one.layer for one in results] == [0, 1]
    boxed = sum(task[index].true_box is not None for index in range(6))
    assert {one.samples for one in results} == {boxed}
    # The demo model's preset reads layer 1, chosen on other scenes.
    assert best_layer(results).layer == 1
    assert results[1].covered > results[0].covered


def test_a_layer_of_qwen_is_measured_and_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user finds the layer of a small model, which has no layer 22 as the preset says."""
    folder, path = save_tiny_qwen(tmp_path / "Qwen2.5-VL-tiny"), tmp_path / "layers.yaml"
    options = ("--model", str(folder), "--limit", "3", "--view-px", "112", "--prompt", "vicrop")
    code, out, err = call(capsys, "calibrate", "layers", *options, "--out", str(path))
    assert (code, "calibrate:" in err) == (0, False), err
    found = load_calibration(path)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert [one["layer"] for one in found.made["layers"]] == list(range(layers))
    assert found.made["model_options"] == {"prompt": "vicrop", "view_px": 112}
    best = max(found.made["layers"], key=lambda one: (one["covered"], -one["layer"]))
    assert found.layer == best["layer"]
    assert f"layer {found.layer}" in out
    # The preset's layer does not exist in this model.
    with pytest.raises(ConfigError, match="layer 22 does not exist"):
        open_model(str(folder))
    overrides = server_plugin.cli.serve._calibrated(
        {"view_px": 112, "eta": None}, path, str(folder)
    )
    backend, preset = open_model(str(folder), **overrides)
    assert (backend.info.layer, preset.layer) == (found.layer, found.layer)
    asyncio.run(backend.close())


def test_every_number_of_the_layers_leads_to_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "layers.yaml"
    options = ("--limit", "3", "--layer", "1", "--layer", "2", "--out", str(path))
    code, _, err = call(capsys, "calibrate", "layers", "--split", "val", *options)
    assert (code, "calibrate:" in err) == (0, False)
    found = load_calibration(path)
    rows = found.made["rows"]
    file = path.with_name(rows["file"])
    assert file.name == "layers.parquet"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == rows["sha256"]
    regions = read_regions(file)
    assert [msgspec.to_builtins(one) for one in by_layer(regions)] == found.made["layers"]
    task = open_task("signs", split="val", limit=3)
    for region in regions:
        sample = task[region.index]
        assert (region.id, region.image_id) == (sample.id, sample.image_id)
        assert region.true_box == list(sample.true_box or ())
        assert region.covered == covered(region.true_box, region.box)
    # The report copies the rows.
    inputs = sort_runs([run_of(answers(20))], layers=found, resamples=10)
    table = tables.table_layers(inputs)
    assert [row["layer"] for row in table] == [1, 2]
    for row_ in table:
        of = row_["rows"]
        assert (of["file"], of["sha256"]) == (rows["file"], rows["sha256"])
        wanted = expanded(of["index"])
        mine = [r for r in regions if r.layer == of["layer"] and r.index in wanted]
        assert len(mine) == of["count"] == row_["samples"] == len(wanted)
        assert np.mean([r.covered for r in mine]) == row_["covered"]
        assert np.mean([r.covered == 1 for r in mine]) == row_["whole"]
    assert f"{rows['file']}," in table_format.csv_text(table)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[LayerRegion]:
    """Made-up rows instead of a measurement of the demo model."""
    regions = [
        LayerRegion(
            layer=n, index=i, id=f"s{i}", image_id=f"i{i}", true_box=BOX, box=box, covered=share
        )
        for n, box, share in ((0, [0, 0, 2, 3], 0.5), (1, BOX, 1.0))
        for i in (0, 2)
    ]

    async def found(*_: object, **__: object) -> tuple[list[LayerRegion], str]:
        return regions, "demo"

    monkeypatch.setattr("eval.runs.layers.measure_layers", found)
    return regions


def test_a_note_warns_against_choosing_layers_on_the_reported_split(
    measured: list[LayerRegion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.yaml"
    _, _, err = call(capsys, "calibrate", "layers", "--split", "test", "--out", str(path))
    warning = "test is the split of signs that is reported"
    assert warning in err
    assert warning in load_calibration(path).made["note"]


def test_a_report_names_the_rows_of_its_layers(
    measured: list[LayerRegion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "layers.yaml", tmp_path / "report"
    assert call(capsys, "calibrate", "layers", "--split", "val", "--out", str(path))[0] == 0
    given = ("--layers", str(path), "--resamples", "10", "--format", "png", "--out", str(out))
    assert call(capsys, "eval", "report", str(COMMITTED / "runs" / "jpeg-5"), *given)[0] == 0
    table = json.loads((out / RESULTS).read_text(encoding="utf-8"))["tables"]["layers"]["rows"]
    regions = read_regions(tmp_path / table[0]["rows"]["file"])
    assert regions == measured
    for one, covers in zip(table, (0.5, 1.0), strict=True):
        assert one["rows"]["index"] == "0,2"
        assert one["rows"]["count"] == 2
        assert one["covered"] == covers
    (first, _) = csv.DictReader((out / "layers.csv").read_text(encoding="utf-8").splitlines())
    assert (first["rows_file"], first["rows_layer"]) == ("layers.parquet", "0")


def test_on_ties_the_first_layer_wins() -> None:
    same = [Layer(layer=n, covered=0.5, whole=0.1 * n, samples=3) for n in (2, 0, 1)]
    assert best_layer(same).layer == 0


# --- the file -------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def test_the_note_on_the_reported_split_is_on_stderr_and_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = saved(tmp_path / "run", rows(100)), tmp_path / "c.yaml"
    code, _, err = call(capsys, "calibrate", str(run), "--target-rate", "0.3", "--out", str(path))
    assert code == 0
    assert err.startswith("vlm-collab calibrate: test is the split of signs that is reported")
    assert load_calibration(path).made["note"] in err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", rows(100), split="val")


def test_serve_reads_the_file_of_calibrate(
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
    """Model options with which `serve` would start, and its stderr."""
    seen: dict[str, Any] = {}

    async def start(model: str, config: object, *, model_options: Any, **rest: object) -> None:
        seen.update({key: value for key, value in model_options.items() if value is not None})

    monkeypatch.setattr(server_plugin.cli.serve, "_serve", start)
    _, _, err = call(capsys, "serve", *arguments)
    return seen, err


def write(path: Path, **fields: Any) -> str:
    content = {"format": 1, "model": "demo", "metric": "margin", "eta": 0.5, "layer": 2, **fields}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_user_s_options_take_precedence_over_the_calibration(
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
def test_an_unusable_file_gets_one_line(
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


def test_invalid_yaml_and_a_missing_file_are_refused(
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
        ([], "give one of --target-rate"),
        (["--target-rate", "0.3", "--max-bytes", "9"], "give one of --target-rate"),
        (["--target-rate", "2"], "must be between 0 and 1"),
        (["--max-accuracy-loss", "0"], "largest loss must be"),
        (["--max-accuracy-loss", "0.1", "--confidence", "1"], "confidence must be"),
        (["--max-accuracy-loss", "0.1", "--most-per-picture", "0"], "most-per-picture"),
        (["--target-rate", "0.3", "--metric", "doubt"], "'doubt' is not a valid Metric"),
    ],
)
def test_wrong_use_gets_one_line(
    arguments: list[str], line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "calibrate", str(folder), *arguments)
    assert code == 2
    assert line in err
    assert len(err.splitlines()) == 1
