"""Reports as folders and as a command: files, differences to an earlier report, wrong use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.cli.main import main
from eval.analysis.records import PROVENANCE, write_shard
from eval.analysis.run import open_run
from eval.report.demo import COMMITTED, pack
from eval.report.differences import differences
from eval.report.inputs import sort_runs
from eval.report.write import RESULTS, write_report
from tests.eval.test_sweep import saved
from tests.support.report_runs import KINDS, answers, made
from tests.support.rows import run_of

RUNS = COMMITTED / "runs"


def test_a_failed_sample_of_one_run_is_left_out_and_noted(tmp_path: Path) -> None:
    of_task = {"samples": 200}
    main_run, hd = made(name="main", task=of_task), made(name="hd", method="hd", task=of_task)
    hd = replace(hd, records=[r for r in hd.records if r.index != 7])
    model = made(name="m", weights="w", task=of_task)
    model = replace(model, records=[r for r in model.records if r.index not in (7, 9)])
    quality = run_of(answers(50, kinds=KINDS), name="q", codec=5, task={"samples": 50})
    inputs = sort_runs([main_run, hd, model, quality], resamples=10)
    report = write_report(inputs, tmp_path, formats=["png"])
    rows = {one["name"]: one["rows"] for one in report["tables"]["baselines"]["rows"]}
    assert rows["LLaVA-1.5-HD"]["count"] == rows["oracle"]["count"] == 198
    assert rows["oracle"]["index"] == "0-6,8,10-199"
    # A run that is compared with the first one only does not reduce the samples of other figures.
    assert report["figures"]["fig-12-qualities"]["panels"][0]["rows"]["count"] == 48
    (note,) = report["notes"]
    assert note == (
        "2 of 200 samples are left out of all figures: of the runs that are compared, "
        "some lack them (hd 1, m 2)"
    )
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert f"**{note}.**" in page
    assert "\nEach run, with `--threads 1`:\n" in page  # needed for the same bits
    # Each run's gaps count its own missing samples only.
    assert "main: " not in page
    assert "hd: 1 of 200 samples have no row" in page
    assert (report["runs"]["main"]["rows"], report["runs"]["hd"]["rows"]) == (200, 199)
    assert "missing" not in report["runs"]["main"]


def test_every_kind_of_difference_is_listed() -> None:
    before = {
        "tables": {"t": {"rows": [{"name": "a", "x": 1.0}, {"name": "b", "x": 2.0}]}},
        "figures": {"f": {"y": [1.0, 2.0], "title": "one", "z": [1.0]}},
    }
    after = {
        "tables": {"t": {"rows": [{"name": "a", "x": 1.5}, {"name": "c", "x": 2.0}]}},
        "figures": {"f": {"y": [1.0, 2.25], "title": "two", "z": [1.0, 2.0]}},
    }
    assert differences(before, before) == []
    assert differences({"figures": {"x": 1.0}}, {"figures": {"x": 1.0 + 1e-12}}) == []
    assert differences(before, after) == [
        "tables/t/rows/a/x: 1 -> 1.5 (+0.5)",
        "tables/t/rows/b: only before",
        "tables/t/rows/c: only now",
        "figures/f/title: one -> two",
        "figures/f/y: by at most 0.25",
        "figures/f/z: 1 numbers before, 2 now",
    ]


def test_packing_keeps_the_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", answers(5))
    provenance = json.loads((folder / PROVENANCE).read_text())
    (folder / PROVENANCE).write_text(
        json.dumps({**provenance, "command": ["/some/where.py", "eval"]})
    )
    third = [1 / 3] * 4
    write_shard(folder / "part-00000005.parquet", [replace(r, index=r.index + 5, map=third) for r in
                answers(3)])  # fmt: skip
    before = open_run(folder)
    pack(folder)
    after = open_run(folder)
    assert {path.name for path in folder.iterdir()} == {"rows", PROVENANCE}
    assert [path.name for path in folder.glob("rows/*")] == ["part-00000000.parquet"]
    assert [replace(r, map=[]) for r in after.records] == [
        replace(r, map=[]) for r in before.records
    ]
    assert after.records[-1].map == pytest.approx(third, rel=1e-7)
    assert after.provenance == {**provenance, "command": ["vlm-collab", "eval"]}
    whole = (folder / "rows" / "part-00000000.parquet").read_bytes()
    pack(folder)
    assert (folder / "rows" / "part-00000000.parquet").read_bytes() == whole


@pytest.mark.parametrize(
    ("finished", "why"), [("now", "failed"), (None, "failed or are still to be done")]
)
def test_samples_without_a_row_are_counted_on_stderr_and_in_the_page(
    finished: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "run", answers(40), samples=42)
    provenance = json.loads((folder / PROVENANCE).read_text())
    provenance["model"]["view"] = [112, 112]
    (folder / PROVENANCE).write_text(json.dumps({**provenance, "finished": finished}))
    out = tmp_path / "report"
    line = f"2 of 42 samples have no row ({why}); all figures leave them out"
    for command in (
        ["eval", "report", str(folder), "--resamples", "10", "--format", "png", "--out", str(out)],
        ["eval", "sweep", str(folder), "--out", str(tmp_path / "sweep")],
        ["calibrate", str(folder), "--target-rate", "0.5", "--out", str(tmp_path / "c.yaml")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        assert line in capsys.readouterr().err
    assert line in (out / "index.md").read_text()
    assert json.loads((out / RESULTS).read_text())["runs"]["run"]["missing"] == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--format", "svg"], "there is no format 'svg'"),
        (["--against", "nothing.json"], "nothing.json is not a report"),
        (["--val", "nowhere"], "nowhere holds no run"),
        (["--layers", "nowhere.yaml"], "cannot be read"),
        (["--scorer", "vqa"], "no scorer 'vqa'"),
    ],
)
def test_wrong_use_gets_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "report", str(RUNS / "test"), *arguments, "--out", str(tmp_path / "a")])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1
