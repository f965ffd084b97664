"""Sweep: all trade-off curves of one run, as tables and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from eval.analysis.baselines import Oracle
from eval.analysis.curves import Criterion, Curve, area_over_random, curve, end_points
from eval.analysis.operating_points import Point
from eval.analysis.run import Run
from eval.report.style import COLOURS, MUTED, in_style, new_figure, save

FIGURES = (
    "eta", "sent", "rate", "accuracy", "cost_pixels", "cost_bytes", "bytes_up", "bytes_down",
    "relative_flops", "relative_paper_flops",
)  # fmt: skip
"""Columns of a point, besides the criterion."""


def sweep(run: Run, settings: Sequence[Criterion]) -> list[Curve]:
    """Compute the curves of some criteria.

    Raises:
        ConfigError: see `curve`.
    """
    return [curve(run, setting) for setting in settings]


def table_of(curves: Sequence[Curve]) -> pa.Table:
    """Table with one row for each point of each curve."""
    columns: dict[str, list[Any]] = {name: [] for name in ("metric", "aggregate", "k", *FIGURES)}
    for one in curves:
        count = len(one.sent)
        columns["metric"] += [one.setting.metric.value] * count
        columns["aggregate"] += [one.setting.aggregate.value] * count
        columns["k"] += [one.setting.k if one.setting.aggregate == "first_k" else None] * count
        for name in FIGURES:
            columns[name] += getattr(one, name).tolist()
    types = {"metric": pa.string(), "aggregate": pa.string(), "k": pa.int64(), "sent": pa.int64()}
    return pa.table(
        {
            name: pa.array(
                values, type=types.get(name, pa.float64()), from_pandas=name not in types
            )
            for name, values in columns.items()
        }
    )


def write(run: Run, curves: Sequence[Curve], folder: Path) -> None:
    """Write `sweep.parquet`, `sweep.csv`, `sweep.json` and `sweep.png`.

    The same run gives the same files, bit by bit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(curves)
    pq.write_table(table, folder / "sweep.parquet", compression="zstd")
    pyarrow.csv.write_csv(table, folder / "sweep.csv")
    content = {
        "task": run.provenance["task"],
        "model": run.provenance["model"].get("name"),
        "codec": run.provenance.get("codec"),
        "samples": len(run.records),
        "curves": [
            {
                "metric": one.setting.metric,
                "aggregate": one.setting.aggregate,
                "k": one.setting.k if one.setting.aggregate == "first_k" else None,
                "area_over_random": area_over_random(one, run),
                **{name: _plain(getattr(one, name)) for name in FIGURES},
            }
            for one in curves
        ],
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
    save(draw(run, curves), folder / "sweep.png")


@in_style()
def draw(run: Run, curves: Sequence[Curve]) -> Figure:
    """Draw all curves over the four costs, with the full aggregation in thicker lines."""
    figure = new_figure(11.0, 8.0)
    axes = figure.subplots(2, 2, sharey=True).flat
    never, always = end_points(run)
    oracle = Oracle().points(run)[0]
    costs: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
        ("cost_pixels", "additional communication cost (pixels)", lambda p: p.cost_pixels),
        ("bytes_up", "bytes sent by the edge, mean", lambda p: p.up),
        ("cost_bytes", "picture bytes over those of views as JPEG 100", lambda p: p.cost_bytes),
        (
            "relative_flops",
            "decoder FLOPs as spent, over first passes",
            lambda p: p.flops / never.flops,
        ),
    )
    metrics = list(dict.fromkeys(one.setting.metric for one in curves))
    for panel, (name, label, cost) in zip(axes, costs, strict=True):
        for one in curves:
            full = one.setting.aggregate == "full"
            panel.plot(
                getattr(one, name),
                one.accuracy,
                color=COLOURS[metrics.index(one.setting.metric)],
                linewidth=1.8 if full else 0.7,
                alpha=1.0 if full else 0.5,
                label=one.setting.metric.replace("_", "-") if full else None,
            )
        x = [cost(never), cost(always)]
        y = [never.accuracy, always.accuracy]
        panel.plot(x, y, ":", color=MUTED, label="random")
        panel.plot([cost(oracle)], [oracle.accuracy], "*", color=MUTED, ms=9, label="oracle")
        panel.set_xlabel(label)
        panel.set_ylabel("accuracy")
    figure.axes[0].legend(loc="lower right")
    task = run.provenance["task"]
    figure.suptitle(f"{task['name']} {task['split']}, {len(run.records)} samples, {task['scorer']}")
    return figure


def _plain(values: np.ndarray[Any, Any]) -> list[float | int | None]:
    """Replace NaN, which JSON does not have, with None."""
    return [None if value != value else value for value in values.tolist()]
