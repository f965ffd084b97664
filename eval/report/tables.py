"""Rows of a report's tables, as JSON.

Tables I-III are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349). `eval.report.table_format` prints the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.analysis.baselines import (
    FullRetransmission,
    GlobalOnly,
    HighResolution,
    Oracle,
    RandomRetransmission,
    SendOriginal,
    VicropAlways,
)
from eval.analysis.boxes import covered, covered_at_random
from eval.analysis.curves import Criterion, end_points
from eval.analysis.operating_points import Baseline, Column, column, two_stage_point
from eval.analysis.records import truth_of
from eval.analysis.run import Run
from eval.analysis.separation import separation
from eval.analysis.statistics import finite
from eval.analysis.thresholds import for_loss, for_rate
from eval.analysis.trace import rows_of
from eval.report.figures import CONFIDENCE, MAX_LOSS, METRIC_NAMES, areas, chosen_on
from eval.report.inputs import Inputs
from eval.report.panels import sent_at
from eval.tasks.catalogue import task_kind
from server_plugin.models.calibration import Calibration
from vlm_collab.method.policy import Aggregate

Row = dict[str, Any]

RANDOM_RATES = (0.1, 0.3, 0.5)
TARGET_RATES = (0.1, 0.3, 0.5)


def table1(inputs: Inputs) -> list[Row]:
    """Table I: visual tokens, and mean length of prompts."""
    run, rows = inputs.main, []
    if run.decoder is None or not run.records[0].first_input_tokens:
        return []
    for pass_, pictures in (("initial inference", 1), ("second inference", 2)):
        name = "first_input_tokens" if pictures == 1 else "second_input_tokens"
        lengths = column(run, name)
        if not (lengths > 0).any():
            continue
        length = float(lengths[lengths > 0].mean())  # 0 means that there was no second pass
        visual = pictures * run.decoder.visual_tokens
        rows.append(
            {
                "pass": pass_,
                "visual_tokens": visual,
                "mean_input_tokens": length,
                "visual_share": visual / length,
                "rows": rows_of(run),
                "formula": f"n_v of the model; mean of {name}",
            }
        )
    return rows


def table2(inputs: Inputs) -> list[Row]:
    """Table II: how well the metrics separate right from wrong first answers."""
    end = inputs.include_end
    return [
        _separated(title, METRIC_NAMES[metric], run, Criterion(metric, include_end=end), inputs)
        for title, run in inputs.parts()
        for metric in inputs.metrics
    ]


def table3(inputs: Inputs) -> list[Row]:
    """Table III: starting token against the average over the answer."""
    end = inputs.include_end
    settings = {
        "starting token": Criterion(aggregate=Aggregate.FIRST, include_end=end),
        "full token average": Criterion(include_end=end),
    }
    return [
        _separated(title, name, run, setting, inputs)
        for title, run in inputs.parts()
        for name, setting in settings.items()
    ]


def table_metrics(inputs: Inputs) -> list[Row]:
    """Areas between trade-off curves and the random line."""
    return areas(inputs)


def table_baselines(inputs: Inputs) -> list[Row]:
    """Operating points of every method on the main run's samples."""
    run = inputs.main
    methods: list[tuple[Baseline, Run]] = [
        (GlobalOnly(), run),
        (FullRetransmission(), run),
        (RandomRetransmission(rates=RANDOM_RATES), run),
        (Oracle(), run),
    ]
    if "preset" in run.provenance["model"]:
        methods.append((SendOriginal(), run))
    if run.decoder is not None:
        methods.append((VicropAlways(), run))
    if inputs.hd is not None:
        methods.append((HighResolution(), inputs.hd))
    bootstrap = inputs.bootstrap(run)
    never, _ = end_points(run)
    rows = []
    for method, source in methods:
        for point in method.points(source):
            low, high = bootstrap.mean(point.scores)
            figures = {name: _plain(value) for name, value in point.figures().items()}
            figures["setting_is"] = "" if point.setting is None else method.setting_is
            figures["relative_flops"] = finite(point.flops / never.flops)
            figures["relative_paper_flops"] = finite(point.paper_flops / never.paper_flops)
            rows.append({**figures, "accuracy_interval": [low, high], "rows": rows_of(source)})
    return rows


def table_chosen(inputs: Inputs) -> list[Row]:
    """Thresholds chosen on the validation run, and their results on the reported run."""
    val, run = inputs.val, inputs.main
    if val is None:
        return []
    setting = Criterion(include_end=inputs.include_end)
    chosen: list[tuple[str, Calibration]] = []
    for rate in TARGET_RATES:
        chosen.append((f"target rate {rate:g}", for_rate(val, setting, rate)))
    name = f"loss at most {MAX_LOSS:g}, {CONFIDENCE:.0%} sure"
    chosen.append((name, for_loss(val, setting, MAX_LOSS, CONFIDENCE)))
    rows = []
    for name, found in chosen:
        assert found.eta is not None
        on_val = {f"val_{key}": found.expected[key] for key in ("rate", "accuracy", "bytes_up")}
        row = _applied(name, found.eta, setting, run, inputs)
        rows.append({**row, **on_val, **chosen_on(inputs, found)})
    preset = run.provenance["model"].get("preset")
    if preset is not None:
        policy = run.preset.policy()
        of_preset = Criterion(policy.metric, policy.aggregate, policy.k, policy.include_end)
        rows.append(_applied("the preset's", policy.eta, of_preset, run, inputs))
    return rows


def calibrate_command(val: str, scorer: str | None = None) -> list[str]:
    """Arguments of the command that writes the guaranteed threshold of `table_chosen` to a file.

    Args:
        val: folder of the validation run.
        scorer: scorer of the report; None for the task's default.
    """
    command = ["calibrate", val, "--max-accuracy-loss", f"{MAX_LOSS:g}"]
    command += ["--confidence", f"{CONFIDENCE:g}", "--metric", "min_entropy", "--aggregate", "full"]
    command += [] if scorer is None else ["--scorer", scorer]
    return [*command, "--out", "calibration.yaml"]


def chosen_notes(inputs: Inputs, rows: Sequence[Row]) -> str:
    """Text above `table_chosen` that says what the guarantee does not cover."""
    text = (
        f"“{CONFIDENCE:.0%} sure” refers to the mean over pictures with the mixture of questions "
        "of the validation split, not to each kind of question."
    )
    task = inputs.main.provenance["task"]
    if (task["name"], task["split"]) == ("signs", "test"):
        text += (
            " The test split differs from it by design: half of its signs have a font, and half of "
            "its backgrounds a texture, that no other split has."
        )
    text += " The loss is measured against full retransmission"
    best = max(rows, key=lambda row: float(row["accuracy"]))
    if best["loss_interval"][1] < 0:
        text += (
            f", which itself is worse than the best of these thresholds "
            f"(“{best['name']}”: {best['accuracy']:.1%} against "
            f"{best['accuracy'] + best['loss']:.1%})"
        )
    return f"{text}."


def table_boxes(inputs: Inputs) -> list[Row]:
    """Coverage of the true box by regions and by random regions, and the gain of second answers,
    by kind of question."""
    rows = []
    kinds = [("all questions", inputs.main)]
    if not inputs.tasks:
        kinds += [one for one in inputs.kinds() if one[0] != "all questions"]
    else:
        kinds = inputs.kinds()
    for title, run in kinds:
        bootstrap = inputs.bootstrap(run)
        gain = column(run, "second_score") - column(run, "first_score")
        row: Row = {
            "part": title,
            "rows": rows_of(run),
            "gain": float(gain.mean()),
            "gain_interval": list(bootstrap.mean(gain)),
            "improved": int((gain > 0).sum()),
            "worsened": int((gain < 0).sum()),
        }
        with_box = [record for record in run.records if record.true_box and record.box]
        row["with_box"] = len(with_box)
        if with_box:
            boxed = Run(folder=run.folder, provenance=run.provenance, records=with_box)
            row["index_with_box"] = rows_of(boxed)["index"]
            shares = np.array([covered(r.true_box, r.box) for r in with_box])
            chance = np.array(
                [
                    covered_at_random(r.true_box, r.box, r.source_width, r.source_height)
                    for r in with_box
                ]
            )
            row |= {
                "covered": float(shares.mean()),
                "covered_at_random": float(chance.mean()),
                "difference": float((shares - chance).mean()),
                "difference_interval": list(inputs.bootstrap(boxed).mean(shares - chance)),
            }
        rows.append(row)
    return rows


def table_summaries(inputs: Inputs) -> list[Row]:
    """The tasks' own summaries of a whole split, for first and second answers."""
    rows = []
    for run in (inputs.main, *inputs.tasks, *inputs.models):
        kind = task_kind(str(run.provenance["task"]["name"]))
        truths = [truth_of(record) for record in run.records]
        for name, summary in kind.summaries.items():
            first = summary([record.first_text for record in run.records], truths)
            second = summary([record.second_text for record in run.records], truths)
            rows += [
                {
                    "run": run.folder.name,
                    "summary": name,
                    "of": key,
                    "first": finite(float(first[key])),
                    "second": finite(float(second[key])) if key in second else None,
                    "rows": rows_of(run),
                }
                for key in first
            ]
    return rows


def table_layers(inputs: Inputs) -> list[Row]:
    """Results of `calibrate layers` on a split that is not reported, and their rows."""
    if inputs.layers is None:
        return []
    found = inputs.layers
    rows = found.made.get("rows")  # missing in older files
    return [
        {
            **row,
            "chosen": row["layer"] == found.layer,
            "split": found.made["split"],
            **({"rows": {**rows, "layer": row["layer"], "count": row["samples"]}} if rows else {}),
        }
        for row in found.made["layers"]
    ]


def _applied(name: str, eta: float, setting: Criterion, run: Run, inputs: Inputs) -> Row:
    sent = sent_at(run, setting, eta)
    point = two_stage_point(run, sent, name)
    bootstrap = inputs.bootstrap(run)
    _, always = end_points(run)
    loss: Column = always.scores - point.scores
    return {
        "name": name,
        "setting": setting.name,
        "eta": eta,
        "rate": point.rate,
        "rate_interval": list(bootstrap.mean(point.sent)),
        "accuracy": point.accuracy,
        "accuracy_interval": list(bootstrap.mean(point.scores)),
        "loss": float(loss.mean()),
        "loss_interval": list(bootstrap.mean(loss)),
        "bytes_up": point.up,
        "rows": rows_of(run),
    }


def _separated(title: str, name: str, run: Run, setting: Criterion, inputs: Inputs) -> Row:
    found = separation(run, setting, inputs.bootstrap(run))
    kept = (
        *("overlap", "overlap_interval", "distance", "distance_interval", "interval_note"),
        *("auroc", "right", "wrong", "by_bins", "rows"),
    )
    row = {"part": title, "name": name, "setting": setting.name}
    return row | {key: found[key] for key in kept if key in found}


def _plain(value: Any) -> Any:
    return finite(value) if isinstance(value, float) else value
