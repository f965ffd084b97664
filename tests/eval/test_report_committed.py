"""The committed report: every number leads to its rows, and its runs reproduce it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.cli.main import main
from eval.analysis.baselines import retransmits
from eval.analysis.curves import Criterion
from eval.analysis.operating_points import two_stage_point
from eval.analysis.run import Run, open_run
from eval.analysis.trace import expanded, provenance_of
from eval.report import table_format, table_list
from eval.report.demo import COMMITTED, commands, report_command
from eval.report.findings import findings
from eval.report.write import RESULTS
from server_plugin.models.calibration import load_calibration
from vlm_collab.method.policy import Aggregate, Metric

RUNS = COMMITTED / "runs"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((COMMITTED / RESULTS).read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="module")
def runs(committed: dict[str, Any]) -> dict[str, Run]:
    return {name: open_run(RUNS / name) for name in committed["runs"]}


def test_committed_runs_are_those_that_were_reported(
    committed: dict[str, Any], runs: dict[str, Run]
) -> None:
    for name, run in runs.items():
        assert json.loads(json.dumps(provenance_of(run))) == committed["runs"][name]


def test_every_point_of_every_curve_leads_to_its_rows(
    committed: dict[str, Any], runs: dict[str, Run]
) -> None:
    lines = [
        one
        for figure in committed["figures"].values()
        for panel in figure.get("panels", ())
        for one in panel["lines"]
    ]
    assert len(lines) > 20
    for one in lines:
        run = runs[one["rows"]["run"]]
        wanted = set(expanded(one["rows"]["index"]))
        run = replace(run, records=[r for r in run.records if r.index in wanted])
        assert len(run.records) == one["rows"]["count"]
        metric, _, how = one["setting"].partition("/")
        first_k = how.startswith("first_")
        aggregate = Aggregate.FIRST_K if first_k else Aggregate(how)
        setting = Criterion(Metric(metric), aggregate, int(how[6:]) if first_k else 1)
        for place in (1, len(one["eta"]) // 2):
            policy = setting.policy(one["eta"][place])
            sent = np.array([retransmits(policy, r) for r in run.records], dtype=float)
            assert sent.sum() == one["sent"][place]
            assert two_stage_point(run, sent, "").accuracy == pytest.approx(one["y"][place])


def test_marks_and_tables_lead_to_rows_too(committed: dict[str, Any], runs: dict[str, Run]) -> None:
    oracle = committed["figures"]["fig-04-communication"]["panels"][1]["marks"][0]
    wanted = set(expanded(oracle["rows"]["index"]))
    best = [max(r.first_score, r.second_score) for r in runs["test"].records if r.index in wanted]
    assert oracle["y"] == pytest.approx(np.mean(best))
    for row in committed["tables"]["boxes"]["rows"]:
        wanted = set(expanded(row["rows"]["index"]))
        chosen = [r for r in runs[row["rows"]["run"]].records if r.index in wanted]
        gains = [r.second_score - r.first_score for r in chosen]
        assert row["gain"] == pytest.approx(np.mean(gains))
        assert row["improved"] == sum(gain > 0 for gain in gains)
    first = committed["tables"]["table-1"]["rows"][0]
    tokens = [r.first_input_tokens for r in runs["test"].records]
    assert first["mean_input_tokens"] == pytest.approx(np.mean(tokens))


def test_the_committed_report_names_the_commands_that_make_it(committed: dict[str, Any]) -> None:
    resampled = ["--resamples", "1000", "--seed", "0"]
    command = report_command()
    assert committed["command"] == ["vlm-collab", *command[:-2], *resampled, *command[-2:]]
    called = {" ".join(run["command"][1:]) for run in committed["runs"].values()}
    assert called == {" ".join(one) for one in commands(1000, 400, 300) if one[1] == "run"}
    assert committed["runs"]["test"]["commit"]
    # The threshold's file and the page name the threshold's command.
    page = (COMMITTED / "index.md").read_text(encoding="utf-8")
    found = load_calibration(COMMITTED / "calibration.yaml")
    (called,) = [one for one in commands(1000, 400, 300) if one[:2] == ["calibrate", "runs/val"]]
    assert found.made["command"] == ["vlm-collab", *called]
    assert f"\n    vlm-collab {' '.join(called)}\n" in page
    chosen = {row["name"]: row for row in committed["tables"]["chosen"]["rows"]}
    assert chosen["loss at most 0.01, 95% sure"]["eta"] == found.eta
    assert not committed["left_out"]


def test_the_committed_page_says_what_its_tables_say(committed: dict[str, Any]) -> None:
    page = (COMMITTED / "index.md").read_text(encoding="utf-8")
    for sentence in findings(committed["tables"]):
        assert f"\n- {sentence}\n" in page
    for name, table in committed["tables"].items():
        printed = table_format.markdown(table["rows"], table_list.TABLES[name][3])
        for text in (page, (COMMITTED / f"{name}.md").read_text(encoding="utf-8")):
            assert f"\n{table['formula']}\n\n{printed}" in text
    assert committed["figures"]["fig-11-pictures"]["rule"] in page


def test_the_readme_does_not_calibrate_on_the_reported_run() -> None:
    page = (COMMITTED.parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    called = [line.split() for line in page.splitlines() if line.startswith("vlm-collab ")]
    runs = {line[line.index("--out") + 1]: line for line in called if line[1:3] == ["eval", "run"]}
    (reported,) = [line[3] for line in called if line[1:3] == ["eval", "report"]]
    chosen = {line[2] for line in called if line[1] == "calibrate"}
    assert chosen
    for run in chosen:
        assert run != reported
        assert "--split" in runs[run]
        assert "--split" not in runs[reported]


def test_committed_figures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in COMMITTED.glob("*.png")}
    assert len(sizes) == 9
    assert max(sizes.values()) < 150_000


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(tmp_path: Path) -> None:
    chosen = [str(RUNS / name) for name in ("jpeg-5", "jpeg-15")]
    line = ["eval", "report", *chosen, "--resamples", "10"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--out", str(tmp_path / "a")])
    assert ended.value.code == 0
    # Another process with another hash seed and time zone.
    subprocess.run(
        [sys.executable, "-m", "edge_client.cli.main", *line, "--out", str(tmp_path / "b")],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        timeout=300,
    )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len([name for name in names if name.endswith(".pdf")]) == 9
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert all(str(tmp_path) not in (tmp_path / "a" / n).read_text() for n in names if ".md" in n)


@pytest.mark.slow
def test_the_committed_runs_reproduce_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(COMMITTED / part) if "/" in part or ".yaml" in part else part
            for part in report_command()[:-2]]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*line, "--out", str(tmp_path), "--against", str(COMMITTED / RESULTS)])
    assert "0 numbers or series moved" in capsys.readouterr().out
