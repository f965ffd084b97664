"""Tables of a report: rows, their origin, and their printing."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from eval.analysis.curves import Criterion, end_points
from eval.analysis.trace import expanded
from eval.report import table_format, table_list, tables
from eval.report.figures import fig4, fig5, fig6
from eval.report.inputs import sort_runs
from eval.report.panels import sent_at
from eval.report.write import as_json
from tests.support.report_runs import answers, made, others
from tests.support.rows import run_of


def test_the_order_of_hd_s_rows_does_not_matter() -> None:
    # Each picture has four questions, which are right or wrong together.
    main_run = made()
    records = [replace(r, image_id=f"i{r.index // 4}") for r in main_run.records]
    main_run = replace(main_run, records=records)
    rows = [replace(r, first_score=float(r.index // 4 % 3 == 0)) for r in records]
    shuffled = [
        replace(rows[old], index=new)
        for new, old in enumerate(np.random.default_rng(0).permutation(len(rows)))
    ]
    results = []
    for of in (rows, shuffled):
        hd = replace(made(name="hd", method="hd"), records=of)
        inputs = sort_runs([main_run, hd], resamples=200)
        (row_of_hd,) = [r for r in tables.table_baselines(inputs) if "HD" in r["name"]]
        marks = {mark["name"]: mark for mark in fig4(inputs)["panels"][0]["marks"]}
        results.append((row_of_hd["accuracy_interval"], marks["HD"]["y"]))
        index = {record.id: record.index for record in of}
        assert expanded(row_of_hd["rows"]["index"]) == [index[r.id] for r in main_run.records]
    assert results[0] == results[1]


def test_a_run_over_a_service_is_reported_with_its_recorded_metrics() -> None:
    nan = [float("nan")] * 2
    served = [replace(r, first_entropy=nan, first_margin=nan) for r in answers(40)]
    run = run_of(served, visual_tokens=None, hidden_size=None, layers=None)
    del run.provenance["model"]["preset"]
    inputs = sort_runs([run], resamples=20)
    assert [one["name"] for one in fig6(inputs)["panels"][0]["lines"]] == ["min-entropy"]
    assert [one["name"] for one in fig5(inputs)["panels"][0]["lines"]] == ["as executed"]
    for _, make, _, _ in table_list.TABLES.values():
        as_json(make(inputs))  # raises for numbers that JSON does not have
    assert tables.table1(inputs) == []


def test_thresholds_come_from_the_validation_run() -> None:
    val = others(run_of(answers(200, seed=7), name="v", task={"split": "val"}))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    for row in tables.table_chosen(inputs):
        if not row["name"].startswith("target"):
            continue
        rate = float(row["name"].split()[-1])
        assert row["val_rate"] == np.mean(sent_at(val, Criterion(), row["eta"]))
        assert row["val_rate"] == pytest.approx(rate, abs=0.01)
        assert row["rate"] == np.mean(sent_at(inputs.main, Criterion(), row["eta"]))


def test_a_chosen_threshold_names_the_rows_it_was_chosen_on() -> None:
    val = run_of(answers(200, seed=7)[:150], name="v", task={"split": "val"})
    val = others(replace(val, records=val.records[3:]))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    *chosen, of_preset = tables.table_chosen(inputs)
    loss = {"max_accuracy_loss": 0.01, "confidence": 0.95}
    for row in chosen:
        assert row["val_rows"] == {"run": "v", "count": 147, "index": "3-149"}
        assert row["rows"]["run"] == "run"
        rate = row["name"].removeprefix("target rate ")
        wanted = {"target_rate": float(rate)} if rate != row["name"] else loss
        assert row["target"].items() >= wanted.items()
    # The preset's threshold was not chosen on data.
    assert not {"val_rows", "target", "val_rate"} & of_preset.keys()
    read = list(csv.DictReader(table_format.csv_text([*chosen, of_preset]).splitlines()))
    assert (read[0]["val_rows_run"], read[0]["val_rows_index"]) == ("v", "3-149")
    assert (read[0]["target_target_rate"], read[3]["target_confidence"]) == ("0.1", "0.95")
    for figure in (fig4(inputs), fig5(inputs)):
        (mark,) = [one for one in figure["panels"][0]["marks"] if "eta" in one]
        assert mark["eta"] == chosen[3]["eta"]
        assert (mark["val_rows"], mark["target"]) == (chosen[3]["val_rows"], chosen[3]["target"])


def test_the_table_says_what_the_guarantee_does_not_cover() -> None:
    val = others(run_of(answers(200, seed=7), name="v", task={"split": "val"}))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    rows = tables.table_chosen(inputs)
    best = max(rows, key=lambda row: row["accuracy"])
    best["loss_interval"] = [-0.2, -0.1]
    text = tables.chosen_notes(inputs, rows)
    assert "not to each kind of question" in text
    assert "no other split has" in text
    assert f"itself is worse than the best of these thresholds (“{best['name']}”" in text
    best["loss_interval"] = [-0.2, 0.1]
    assert tables.chosen_notes(inputs, rows).endswith("against full retransmission.")


def test_tables_print_every_row_and_column() -> None:
    inputs = sort_runs([made()], resamples=20)
    for title, make, _, cells in table_list.TABLES.values():
        rows = make(inputs)
        lines = table_format.markdown(rows, cells).splitlines()
        assert len(lines) == 2 + len(rows), title
        assert {line.count("|") for line in lines} == {len(cells) + 1}, title
        if rows:
            read = list(csv.DictReader(table_format.csv_text(rows).splitlines()))
            assert len(read) == len(rows)


def test_a_random_table_row_is_what_the_baseline_gives() -> None:
    inputs = sort_runs([made()], resamples=20)
    rows = {(row["name"], row["setting"]): row for row in tables.table_baselines(inputs)}
    never, always = end_points(inputs.main)
    assert rows["global only", None]["accuracy"] == never.accuracy
    assert rows["full retransmission", None]["bytes_up"] == always.up
    assert 0 < rows["random retransmission", 0.3]["rate"] < 0.6
    printed = table_list.TABLES["baselines"][3]
    assert printed["setting"](rows["random retransmission", 0.3]) == "rate 0.3"
    assert printed["setting"](rows["sending the original", 0.25]) == "η 0.25"
    assert printed["setting"](rows["oracle", None]) == ""
    # It was not executed: the cell is empty, and a note says so.
    vicrop = rows["ViCrop always", None]
    assert printed["FLOPs, executed"](vicrop) == ""
    assert "not executed" in printed["note"](vicrop)
    assert float(printed["FLOPs, Eq. 17-20"](vicrop)) > 1


def test_hd_s_note_is_printed() -> None:
    hd = made(name="hd", method="hd", note="not trained for it")
    rows = tables.table_baselines(sort_runs([made(), hd], resamples=20))
    text = table_format.markdown(rows, table_list.TABLES["baselines"][3])
    (line,) = [one for one in text.splitlines() if "LLaVA-1.5-HD" in one]
    assert "| not trained for it |" in line
    assert rows[-1]["rows"]["run"] == "hd"


@pytest.mark.parametrize(("score", "lacking"), [(1.0, "wrong"), (0.0, "right")])
def test_an_undefined_distance_is_not_printed_as_infinite(score: float, lacking: str) -> None:
    run = run_of([replace(r, first_score=score) for r in answers(40)])
    (row,) = tables.table3(sort_runs([run], resamples=20))[:1]
    assert row["overlap"] is row["distance"] is row["overlap_interval"] is None
    assert row["distance_interval"] is None
    _, make, _, cells = table_list.TABLES["table-3"]
    printed = table_format.markdown(make(sort_runs([run], resamples=20)), cells)
    assert "∞" not in printed
    assert printed.count(f"none (there are no {lacking} answers)") == 4
    # The distance is infinite if right and wrong answers share no bin.
    apart = [replace(r, first_min_entropy=[r.first_score] * 2) for r in answers(40)]
    printed = table_format.markdown(make(sort_runs([run_of(apart)], resamples=20)), cells)
    assert "0.00 (no interval: right and wrong answers have no bins in common)" in printed
    assert "∞ (no interval: right and wrong answers have no bins in common)" in printed
