"""Curves: agreement with policies and operating points, bootstrap bands, and `eval sweep`."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from edge_client.cli.main import main
from eval.analysis.baselines import retransmits
from eval.analysis.curves import (
    Bootstrap,
    Criterion,
    area_over_random,
    curve,
    end_points,
    part,
    settings_of,
    with_scores,
)
from eval.analysis.operating_points import two_stage_point
from eval.analysis.records import PROVENANCE, Record, write_shard
from eval.analysis.run import Run
from server_plugin.models.presets import preset_named
from tests.support.rows import row, run_of
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric


def rows(count: int, seed: int = 0, images: int = 2) -> list[Record]:
    """Answers of one to six tokens, with coarse uncertainties, so that many are equal."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.integers(1, 7))
        bits = (rng.integers(0, 9, length) / 4).tolist()
        first, second = (float(rng.choice([0.0, 0.3, 1.0])) for _ in range(2))
        made.append(
            row(
                index,
                first,
                second,
                image_id=f"i{index // images}",
                view_bytes=int(rng.integers(1000, 5000)),
                region_bytes=int(rng.integers(1000, 5000)),
                region_pixels=int(rng.integers(1000, 10_000)),
                first_mflops=int(rng.integers(50, 150)),
                second_mflops=int(rng.integers(50, 150)),
                first_tokens=list(range(length)),
                first_min_entropy=bits,
                first_entropy=[2.0 * one for one in bits],
                first_margin=[1.0 - one / 2 for one in bits],
                first_ended=bool(rng.integers(2)),
            )
        )
    return made


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of(rows(60))


def all_settings(run: Run) -> list[Criterion]:
    made = settings_of(run)
    return made + [replace(setting, include_end=False) for setting in made]


def test_a_sweep_covers_every_metric_and_aggregation(run: Run) -> None:
    names = [setting.name for setting in settings_of(run)]
    lengths = ["full", "first_2", "first_3", "first_4", "first_5", "first"]
    assert names == [f"{metric}/{length}" for metric in Metric for length in lengths]


def test_every_point_sends_the_samples_that_its_policy_sends(run: Run) -> None:
    for setting in all_settings(run):
        drawn = curve(run, setting)
        for sent, eta in zip(drawn.sent, drawn.eta, strict=True):
            policy = setting.policy(float(eta))
            chosen = [place for place, r in enumerate(run.records) if retransmits(policy, r)]
            assert chosen == sorted(drawn.order[:sent].tolist()), (setting.name, eta)


def test_no_threshold_reaches_a_point_that_is_not_on_the_curve(run: Run) -> None:
    for setting in all_settings(run):
        reachable = set(curve(run, setting).sent.tolist())
        for eta in np.linspace(0.0, 1.0 if setting.metric is Metric.MARGIN else 5.0, 31):
            policy = setting.policy(float(eta))
            assert sum(retransmits(policy, r) for r in run.records) in reachable


def test_a_point_equals_the_operating_point_of_its_samples(run: Run) -> None:
    for setting in (Criterion(), Criterion(Metric.MARGIN, Aggregate.FIRST)):
        drawn = curve(run, setting)
        never, _ = end_points(run)
        for place, sent in enumerate(drawn.sent):
            chosen = np.zeros(len(run.records))
            chosen[drawn.order[:sent]] = 1.0
            point = two_stage_point(run, chosen, "")
            expected = {
                "rate": point.rate,
                "accuracy": point.accuracy,
                "cost_pixels": point.cost_pixels,
                "cost_bytes": point.cost_bytes,
                "bytes_up": point.up,
                "bytes_down": point.down,
                "relative_flops": point.flops / never.flops,
                "relative_paper_flops": point.paper_flops / never.paper_flops,
            }
            for name, value in expected.items():
                assert getattr(drawn, name)[place] == pytest.approx(value, rel=1e-12), name


def test_a_margin_of_zero_is_sent_at_any_threshold() -> None:
    made = [row(i, 1.0, 1.0, first_margin=[margin] * 2) for i, margin in enumerate((0.0, 0.5))]
    drawn = curve(run_of(made), Criterion(Metric.MARGIN))
    assert drawn.sent.tolist() == [1, 2]
    # For min-entropy, a threshold above the largest value sends nothing, even if all are 0.
    made = [row(0, 1.0, 1.0, bits=0.0), row(1, 1.0, 1.0, bits=0.0)]
    assert curve(run_of(made), Criterion()).sent.tolist() == [0, 2]


def test_a_run_over_a_service_has_curves_of_recorded_metrics() -> None:
    nan = [float("nan")] * 2
    made = [row(i, 0.0, 1.0, first_entropy=nan, first_margin=nan) for i in range(4)]
    run = run_of(made, visual_tokens=None)
    drawn = curve(run, Criterion())
    assert np.isnan(drawn.relative_paper_flops).all()
    with pytest.raises(ConfigError, match="did not record the margin"):
        curve(run, Criterion(Metric.MARGIN))


def test_scores_follow_from_texts_and_truth() -> None:
    truth = '{"answers": ["snow"], "extra": {}}'
    made = [row(0, 0.5, 0.5, truth=truth, first_text="Snow.", second_text="snowy")]
    run = run_of(made, task={"name": "gqa", "split": "testdev", "scorer": "exact"})
    exact, contained = with_scores(run, "exact").records[0], with_scores(run, "vicrop").records[0]
    assert (exact.first_score, exact.second_score) == (1.0, 0.0)
    assert (contained.first_score, contained.second_score) == (1.0, 1.0)
    assert with_scores(run, "vicrop").provenance["task"]["scorer"] == "vicrop"
    with pytest.raises(ConfigError, match="no scorer 'best'"):
        with_scores(run, "best")


def test_areas_of_known_curves() -> None:
    # The uncertain half gains 1, the other half nothing: the curve rises to 1 at half the samples,
    # then is level. The triangle over the random line has an area of 1/8.
    run = run_of([row(i, float(i >= 50), 1.0, bits=2.0 - i / 100) for i in range(100)])
    assert area_over_random(curve(run, Criterion()), run) == pytest.approx(0.125)
    # The gain does not depend on the uncertainty, so the curve is the random line.
    run = run_of([row(i, float(i % 2), 1.0, bits=float(i // 2)) for i in range(100)])
    assert area_over_random(curve(run, Criterion()), run) == pytest.approx(0.0, abs=1e-12)
    # Half of the samples have a margin of 0, so every threshold sends them. The curve has two
    # points, and its area still starts from "none sent".
    run = run_of([row(i, float(i >= 50), 1.0, first_margin=[i // 50] * 2) for i in range(100)])
    assert area_over_random(curve(run, Criterion(Metric.MARGIN)), run) == pytest.approx(0.125)


# --- bootstrap ------------------------------------------------------------------------------


def test_questions_about_one_picture_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(80)
    images = tuple(f"i{place}" for place in range(80))
    once = Bootstrap(image_ids=images).mean(values)
    # Each question three times per picture: no more data, so the same interval.
    thrice = Bootstrap(image_ids=tuple(np.repeat(images, 3).tolist()))
    assert thrice.mean(np.repeat(values, 3)) == pytest.approx(once)
    # If treated as independent, the interval is narrower by about the square root of three.
    apart = Bootstrap(image_ids=tuple(str(place) for place in range(240)))
    low, high = apart.mean(np.repeat(values, 3))
    assert (high - low) / (once[1] - once[0]) == pytest.approx(3**-0.5, rel=0.1)


def test_intervals_are_as_wide_as_the_normal_approximation_says() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = Bootstrap(image_ids=tuple(map(str, range(400))), resamples=4000).mean(values)
    width = 2 * 1.96 * values.std() / 20
    # 4000 resamples estimate a 2.5 % point to about 3 % of the width.
    assert high - low == pytest.approx(width, rel=0.08)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.05 * width)


def test_bands_end_in_the_intervals_of_the_means(run: Run) -> None:
    bootstrap = Bootstrap.of(run, resamples=200, seed=3)
    drawn = curve(run, Criterion())
    low, high = bootstrap.band(drawn, run, lambda point: point.sent, drawn.rate)
    never, always = end_points(run)
    assert (low[0], high[0]) == pytest.approx(bootstrap.mean(never.scores))
    assert (low[-1], high[-1]) == pytest.approx(bootstrap.mean(always.scores))
    assert (low <= high).all()
    inside = (low <= drawn.accuracy) & (drawn.accuracy <= high)
    assert inside.mean() > 0.95


def test_a_band_equals_the_curves_of_resampled_runs(run: Run) -> None:
    # One resample, made by hand: a run that repeats each picture as often as it was drawn.
    bootstrap = Bootstrap.of(run, resamples=1, seed=8)
    weights = next(iter(bootstrap.weights()))[0]
    again = [r for r, times in zip(run.records, weights, strict=True) for _ in range(int(times))]
    expected = curve(replace(run, records=again), Criterion())
    at = np.linspace(0.05, 0.95, 10)
    low, high = bootstrap.band(curve(run, Criterion()), run, lambda point: point.sent, at)
    assert low == pytest.approx(high)
    assert low == pytest.approx(np.interp(at, expected.rate, expected.accuracy))
    area = bootstrap.areas(curve(run, Criterion()), run)
    assert area == pytest.approx([area_over_random(expected, replace(run, records=again))])


def test_chunked_resamples_equal_those_of_one_chunk(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(60.0)
    whole = Bootstrap.of(run, resamples=50).mean(values)
    monkeypatch.setattr("eval.analysis.curves._CHUNK", 60 * 7)
    assert Bootstrap.of(run, resamples=50).mean(values) == whole


# --- command line ---------------------------------------------------------------------------


def saved(folder: Path, records: list[Record], **task: Any) -> Path:
    folder.mkdir(parents=True)
    provenance = {
        "method": "two_stage",
        "task": {"name": "signs", "split": "test", "scorer": "exact", **task},
        "model": {
            "name": "demo",
            "preset": msgspec.to_builtins(preset_named("demo")),
            "visual_tokens": 64,
            "hidden_size": 192,
            "layers": 4,
        },
        "codec": {"view": ["jpeg", 90], "region": ["jpeg", 90]},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    write_shard(folder / "part-00000000.parquet", records)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "sweep", *arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def test_the_command_writes_the_same_files_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "run", rows(30))
    for out in ("a", "b"):
        code, printed, err = call(capsys, str(folder), "--out", str(tmp_path / out))
        assert (code, err) == (0, "")
        assert "18 curves" in printed
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["sweep.csv", "sweep.json", "sweep.parquet", "sweep.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    table = pq.read_table(tmp_path / "a" / "sweep.parquet").to_pylist()
    with (tmp_path / "a" / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table)
    content = json.loads((tmp_path / "a" / "sweep.json").read_text())
    assert sum(len(one["eta"]) for one in content["curves"]) == len(table)
    first = content["curves"][0]
    assert (first["metric"], first["aggregate"], first["k"]) == ("min_entropy", "full", None)
    assert table[0]["eta"] == first["eta"][0]


def test_options_choose_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [replace(r, category="odd" if r.index % 2 else "even") for r in rows(30)]
    folder = saved(tmp_path / "run", records)
    chosen = ("--metric", "margin", "--aggregate", "first_k", "--k", "3", "--k", "4")
    code, _, _ = call(capsys, str(folder), *chosen, "--category", "odd")
    assert code == 0
    content = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [(one["metric"], one["k"]) for one in content["curves"]] == [
        ("margin", 3),
        ("margin", 4),
    ]
    assert content["samples"] == 15


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--metric", "doubt"], "there is no metric 'doubt'"),
        (["--aggregate", "last"], "there is no aggregate 'last'"),
        (["--scorer", "vqa"], "signs has no scorer 'vqa'"),
        (["--category", "none"], "has no such samples"),
        (["--aggregate", "first_k", "--k", "99"], "longer than k tokens"),
    ],
)
def test_wrong_use_gets_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "run", rows(10))
    code, _, err = call(capsys, str(folder), *arguments)
    assert code == 2
    assert line in err
    assert len(err.splitlines()) == 1


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, str(tmp_path))
    assert code == 2
    assert "holds no run" in err


def test_parts_are_never_empty(run: Run) -> None:
    with pytest.raises(ConfigError, match="no such samples"):
        part(run, lambda record: False)
