"""The tables of a report: Table I-III of 003_92b41fe49395ce1a.txt, and what stands beside them.

Each function gives rows as JSON; `markdown` and `csv_text` print them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
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
from eval.analysis.curves import Bootstrap, Setting, ends
from eval.analysis.operating_points import Baseline, Column, column, two_stage_point
from eval.analysis.records import truth_of
from eval.analysis.run import Run
from eval.analysis.separation import finite, separation
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
    """Table I: visual tokens, and the mean length of prompts."""
    run, made = inputs.main, []
    if run.decoder is None or not run.records[0].first_input_tokens:
        return []
    for pass_, pictures in (("initial inference", 1), ("second inference", 2)):
        name = "first_input_tokens" if pictures == 1 else "second_input_tokens"
        lengths = column(run, name)
        if not (lengths > 0).any():
            continue
        length = float(lengths[lengths > 0].mean())  # 0 where there was no second pass
        visual = pictures * run.decoder.visual_tokens
        made.append(
            {
                "pass": pass_,
                "visual_tokens": visual,
                "mean_input_tokens": length,
                "visual_share": visual / length,
                "rows": rows_of(run),
                "formula": f"n_v of the model; mean of {name}",
            }
        )
    return made


def table2(inputs: Inputs) -> list[Row]:
    """Table II: how far the metrics set right from wrong first answers apart."""
    end = inputs.include_end
    return [
        _separated(title, METRIC_NAMES[metric], run, Setting(metric, include_end=end), inputs)
        for title, run in inputs.parts()
        for metric in inputs.metrics
    ]


def table3(inputs: Inputs) -> list[Row]:
    """Table III: the starting token against the average over the answer."""
    end = inputs.include_end
    settings = {
        "starting token": Setting(aggregate=Aggregate.FIRST, include_end=end),
        "full token average": Setting(include_end=end),
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
    """Every method's operating points on the main run's samples."""
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
    bootstrap = _bootstrap(inputs, run)
    never, _ = ends(run)
    made = []
    for method, source in methods:
        for point in method.points(source):
            low, high = bootstrap.mean(point.scores)
            figures = {name: _plain(value) for name, value in point.figures().items()}
            figures["setting_is"] = "" if point.setting is None else method.setting_is
            figures["relative_flops"] = finite(point.flops / never.flops)
            figures["relative_paper_flops"] = finite(point.paper_flops / never.paper_flops)
            made.append({**figures, "accuracy_interval": [low, high], "rows": rows_of(source)})
    return made


def table_chosen(inputs: Inputs) -> list[Row]:
    """Thresholds chosen on the validation run, and what they give on the reported one."""
    val, run = inputs.val, inputs.main
    if val is None:
        return []
    setting = Setting(include_end=inputs.include_end)
    chosen: list[tuple[str, Calibration]] = []
    for rate in TARGET_RATES:
        chosen.append((f"target rate {rate:g}", for_rate(val, setting, rate)))
    name = f"loss at most {MAX_LOSS:g}, {CONFIDENCE:.0%} sure"
    chosen.append((name, for_loss(val, setting, MAX_LOSS, CONFIDENCE)))
    made = []
    for name, found in chosen:
        assert found.eta is not None
        on_val = {f"val_{key}": found.expected[key] for key in ("rate", "accuracy", "bytes_up")}
        row = _applied(name, found.eta, setting, run, inputs)
        made.append({**row, **on_val, **chosen_on(inputs, found)})
    preset = run.provenance["model"].get("preset")
    if preset is not None:
        policy = run.preset.policy()
        of_preset = Setting(policy.metric, policy.aggregate, policy.k, policy.include_end)
        made.append(_applied("the preset's", policy.eta, of_preset, run, inputs))
    return made


def calibrate_command(val: str, scorer: str | None = None) -> list[str]:
    """What writes the threshold with a guarantee, of `table_chosen` and figures, into a file.

    Args:
        val: the validation run's folder, as it is called.
        scorer: of the report, if not the task's own.
    """
    made = ["calibrate", val, "--max-accuracy-loss", f"{MAX_LOSS:g}"]
    made += ["--confidence", f"{CONFIDENCE:g}", "--metric", "min_entropy", "--aggregate", "full"]
    made += [] if scorer is None else ["--scorer", scorer]
    return [*made, "--out", "calibration.yaml"]


def chosen_notes(inputs: Inputs, rows: Sequence[Row]) -> str:
    """What a reader of `table_chosen` could take for more than it is."""
    said = (
        f"“{CONFIDENCE:.0%} sure” speaks of the mean over pictures, with the mixture of questions "
        "that data like the validation split have, not of a kind of questions by itself."
    )
    task = inputs.main.provenance["task"]
    if (task["name"], task["split"]) == ("signs", "test"):
        said += (
            " The test split differs from it by design: half of its signs have a font, and half of "
            "its backgrounds a texture, that no other split has."
        )
    said += " The loss is measured against full retransmission"
    best = max(rows, key=lambda row: float(row["accuracy"]))
    if best["loss_interval"][1] < 0:
        said += (
            f", which itself is worse than the best of these thresholds "
            f"(“{best['name']}”: {best['accuracy']:.1%} against "
            f"{best['accuracy'] + best['loss']:.1%})"
        )
    return f"{said}."


def table_boxes(inputs: Inputs) -> list[Row]:
    """Whether regions hold the true place, against the same regions placed at random; and what
    the second answer gains, by kind of question."""
    made = []
    kinds = [("all questions", inputs.main)]
    if not inputs.tasks:
        kinds += [one for one in inputs.kinds() if one[0] != "all questions"]
    else:
        kinds = inputs.kinds()
    for title, run in kinds:
        bootstrap = _bootstrap(inputs, run)
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
            held = np.array([covered(r.true_box, r.box) for r in with_box])
            chance = np.array(
                [
                    covered_at_random(r.true_box, r.box, r.source_width, r.source_height)
                    for r in with_box
                ]
            )
            row |= {
                "covered": float(held.mean()),
                "covered_at_random": float(chance.mean()),
                "difference": float((held - chance).mean()),
                "difference_interval": list(_bootstrap(inputs, boxed).mean(held - chance)),
            }
        made.append(row)
    return made


def table_summaries(inputs: Inputs) -> list[Row]:
    """The task's own figures of a whole split, of first and second answers."""
    made = []
    for run in (inputs.main, *inputs.tasks, *inputs.models):
        kind = task_kind(str(run.provenance["task"]["name"]))
        truths = [truth_of(record) for record in run.records]
        for name, summary in kind.summaries.items():
            first = summary([record.first_text for record in run.records], truths)
            second = summary([record.second_text for record in run.records], truths)
            made += [
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
    return made


def table_layers(inputs: Inputs) -> list[Row]:
    """What `calibrate layers` found on data that are not reported, and in which rows."""
    if inputs.layers is None:
        return []
    found = inputs.layers
    rows = found.made.get("rows")  # files that were written before there were any have none
    return [
        {
            **row,
            "chosen": row["layer"] == found.layer,
            "split": found.made["split"],
            **({"rows": {**rows, "layer": row["layer"], "count": row["samples"]}} if rows else {}),
        }
        for row in found.made["layers"]
    ]


# --- printing -------------------------------------------------------------------------------

Cell = Callable[[Row], str]


def number(name: str, digits: int = 3) -> Cell:
    """A column's value; empty where it is not known."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:,.{digits}f}"

    return text


def percent(name: str) -> Cell:
    """A share, with its interval if the row has one."""

    def text(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return ""
        between = row.get(f"{name}_interval")
        shown = f"{value:.1%}"
        return f"{shown} [{between[0]:.1%}, {between[1]:.1%}]" if between else shown

    return text


def ranged(name: str, digits: int = 2) -> Cell:
    """A number with its interval, or why it has none, or why there is no number; a distance is
    infinite where nothing overlaps."""

    def of(value: float | None) -> str:
        return "∞" if value is None else f"{value:z.{digits}f}"

    def text(row: Row) -> str:
        if name not in row:
            return ""
        between, why = row.get(f"{name}_interval"), row.get("interval_note")
        if row[name] is None and not (name == "distance" and row["overlap"] == 0.0):
            return f"none ({why})" if why else "none"
        if between is None:
            return of(row[name]) + (f" (no interval: {why})" if why else "")
        return f"{of(row[name])} [{of(between[0])}, {of(between[1])}]"

    return text


def labelled(name: str) -> Cell:
    """A number after what it is, the column `<name>_is`."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{row[f'{name}_is']} {value:g}".strip()

    return text


def word(name: str) -> Cell:
    """A text, or a whole number."""

    def text(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else str(value)

    return text


def count(row: Row) -> str:
    """How many rows of the run stand behind it."""
    return str(row["rows"]["count"])


TABLES: Mapping[str, tuple[str, Callable[[Inputs], list[Row]], str, Mapping[str, Cell]]] = {
    "table-1": (
        "Visual tokens and mean length of the input (Table I)",
        table1,
        "n_v of the model, and the mean of the columns first_input_tokens and second_input_tokens.",
        {
            "": word("pass"),
            "visual tokens": word("visual_tokens"),
            "mean input": number("mean_input_tokens", 1),
            "visual share": percent("visual_share"),
        },
    ),
    "table-2": (
        "Right and wrong first answers by metric (Table II, Eq. 23-24)",
        table2,
        "Overlap by Eq. 23, Bhattacharyya distance by Eq. 24 (natural logarithm), in 20 "
        "bins of equal width from 0 to 1 for the margin, else to the largest value; 10 "
        "and 40 bins are in report.json. The paper does not state its bins. A first "
        "answer is right if it scores at least one half. Intervals allow for the bias of these "
        "numbers, which may lie near an end of theirs or outside.",
        {
            "questions": word("part"),
            "metric": word("name"),
            "overlap ↓": ranged("overlap"),
            "D_B ↑": ranged("distance"),
            "AUROC ↑": number("auroc"),
            "right": word("right"),
            "wrong": word("wrong"),
        },
    ),
    "table-3": (
        "Starting token against full average, min-entropy (Table III)",
        table3,
        "As the table before.",
        {
            "questions": word("part"),
            "aggregation": word("name"),
            "overlap ↓": ranged("overlap"),
            "D_B ↑": ranged("distance"),
            "AUROC ↑": number("auroc"),
        },
    ),
    "metrics": (
        "Area between trade-off curve and random line, by metric and aggregation",
        table_metrics,
        "Mean over all rates of accuracy minus the random line, and the same minus that "
        "of min_entropy/full, paired in each resample.",
        {
            "questions": word("part"),
            "setting": word("setting"),
            "area": ranged("area", 4),
            "minus min_entropy/full": ranged("difference", 4),
        },
    ),
    "baselines": (
        "All methods on the same samples",
        table_baselines,
        "Costs as in docs/evaluation.md; FLOPs over those of first passes. What is not known is "
        "empty.",
        {
            "method": word("name"),
            "setting": labelled("setting"),
            "accuracy": percent("accuracy"),
            "regions sent": percent("rate"),
            "pixels": number("cost_pixels"),
            "over JPEG 100": number("cost_bytes"),
            "bytes up": number("bytes_up", 0),
            "bytes down": number("bytes_down", 0),
            "FLOPs, Eq. 17-20": number("relative_paper_flops", 2),
            "FLOPs, executed": number("relative_flops", 2),
            "note": word("note"),
        },
    ),
    "chosen": (
        "Thresholds chosen on the validation split",
        table_chosen,
        "η is chosen on the validation run alone. Loss is the accuracy of full "
        "retransmission minus that of the policy.",
        {
            "chosen for": word("name"),
            "η": number("eta", 4),
            "rate, val": percent("val_rate"),
            "rate": percent("rate"),
            "accuracy, val": percent("val_accuracy"),
            "accuracy": percent("accuracy"),
            "loss against full": percent("loss"),
            "bytes up": number("bytes_up", 0),
        },
    ),
    "boxes": (
        "Regions against regions placed at random, and what they are worth",
        table_boxes,
        "Share of the true box's area that lies in the region, and its expectation if the "
        "region lay anywhere in the picture, of the questions with a true box; second minus first "
        "answer of all.",
        {
            "questions": word("part"),
            "n": count,
            "with a box": word("with_box"),
            "covers the true place": percent("covered"),
            "at random": percent("covered_at_random"),
            "difference": percent("difference"),
            "second minus first answer": percent("gain"),
            "improved": word("improved"),
            "worsened": word("worsened"),
        },
    ),
    "summaries": (
        "The task's own figures",
        table_summaries,
        "By the summaries of the task, docs/tasks.md.",
        {
            "run": word("run"),
            "figure": word("summary"),
            "of": word("of"),
            "first": number("first"),
            "second": number("second"),
        },
    ),
    "layers": (
        "Attention layers, on the validation split",
        table_layers,
        "Share of the true box in the region that the layer leads to; the first pass and "
        "the region search of each layer, by the engine. The rows are in the Parquet file "
        "beside the calibration.",
        {
            "layer": word("layer"),
            "covers the true place": percent("covered"),
            "holds all of it": percent("whole"),
            "samples": word("samples"),
            "chosen": lambda row: "yes" if row["chosen"] else "",
        },
    ),
}
"""Title, rows, what its numbers are, and columns of each table, by file name."""


def markdown(rows: Sequence[Row], cells: Mapping[str, Cell]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row) for cell in cells.values())} |")
    return "\n".join(lines) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """All that the rows hold, unrounded; intervals as two columns, where they come from as text."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Row) -> Row:
    made: Row = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            made[f"{name}_low"], made[f"{name}_high"] = value or (None, None)
        elif name in ("rows", "val_rows", "target"):
            made |= {f"{name}_{key}": one for key, one in value.items()}
        elif not isinstance(value, dict | list):
            made[name] = value
    return made


def _applied(name: str, eta: float, setting: Setting, run: Run, inputs: Inputs) -> Row:
    sent = sent_at(run, setting, eta)
    point = two_stage_point(run, sent, name)
    bootstrap = _bootstrap(inputs, run)
    _, always = ends(run)
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


def _separated(title: str, name: str, run: Run, setting: Setting, inputs: Inputs) -> Row:
    found = separation(run, setting, _bootstrap(inputs, run))
    kept = ("overlap", "overlap_interval", "distance", "distance_interval", "interval_note")
    kept += ("auroc", "right", "wrong", "by_bins", "rows")
    row = {"part": title, "name": name, "setting": setting.name}
    row |= {key: found[key] for key in kept if key in found}
    return row


def _bootstrap(inputs: Inputs, run: Run) -> Bootstrap:
    return Bootstrap.of(run, resamples=inputs.resamples, seed=inputs.seed)


def _plain(value: Any) -> Any:
    return finite(value) if isinstance(value, float) else value
