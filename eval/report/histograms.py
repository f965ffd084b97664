"""Fig. 7: how min-entropy separates right from wrong first answers.

The figure is that of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.analysis.curves import Criterion
from eval.analysis.separation import by_step, separation
from eval.analysis.trace import rows_of
from eval.report.inputs import Inputs
from eval.report.style import RIGHT, WRONG, in_style, new_figure
from vlm_collab.method.policy import Aggregate


def fig7(inputs: Inputs) -> dict[str, Any]:
    """Data: means at each step, and histograms of the starting token and of the full average."""
    run = inputs.main
    bootstrap = inputs.bootstrap(run)
    end = inputs.include_end
    return {
        "title": "Min-entropy of right and wrong first answers (Fig. 7)",
        "rows": rows_of(run),
        "steps": by_step(run, bootstrap),
        "first": separation(run, Criterion(aggregate=Aggregate.FIRST, include_end=end), bootstrap),
        "full": separation(run, Criterion(include_end=end), bootstrap),
    }


@in_style()
def draw_fig7(data: dict[str, Any]) -> Figure:
    """Draw the data of `fig7`."""
    figure = new_figure(12.6, 3.9)
    steps, first, full = figure.subplots(1, 3)
    for which, colour in (("right", RIGHT), ("wrong", WRONG)):
        _steps(steps, data["steps"], which, colour)
    steps.set_title("(a) each generated token")
    steps.set_xlabel("generation step")
    steps.set_ylabel("mean min-entropy (bits)")
    steps.set_xticks([row["step"] for row in data["steps"]])
    steps.set_xlim(0.5, len(data["steps"]) + 0.5)
    steps.set_ylim(bottom=0)
    steps.legend(loc="upper right")
    _histogram(first, data["first"], "(b) starting token")
    _histogram(full, data["full"], "(c) full-sequence average")
    figure.suptitle(data["title"], fontsize=11)
    return figure


def _steps(axes: Axes, rows: list[dict[str, Any]], which: str, colour: str) -> None:
    known = [row for row in rows if row[which] is not None]
    at = [row["step"] for row in known]
    values = np.array([row[which] for row in known])
    ends = np.array([row[f"{which}_interval"] for row in known]).T
    axes.errorbar(
        at, values, np.abs(ends - values), color=colour, marker="o", capsize=3, label=which
    )
    for row in known:
        axes.annotate(
            f"n={row[f'{which}_count']}",
            (row["step"], row[which]),
            (7, 4) if which == "wrong" else (-7, 4),
            textcoords="offset points",
            ha="left" if which == "wrong" else "right",
            fontsize=7.5,
            color=colour,
        )


def _histogram(axes: Axes, data: dict[str, Any], title: str) -> None:
    edges = np.array(data["edges"])
    for which, colour, hatch in (("right", RIGHT, None), ("wrong", WRONG, "////")):
        counts = np.array(data[f"{which}_counts"], dtype=np.float64)
        axes.stairs(
            counts / max(1.0, counts.sum()),
            edges,
            fill=True,
            facecolor=(colour, 0.3),
            edgecolor=colour,
            hatch=hatch,
            linewidth=1.2,
            label=f"{which} ({data[which]})",
        )
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_yticks([0, 0.02, 0.05, 0.1, 0.5, 1.0], ["0", "0.02", "0.05", "0.1", "0.5", "1"])
    axes.set_ylim(0, 1.0)
    shown = "not known" if data["overlap"] is None else f"{data['overlap']:.2f}"
    axes.set_title(f"{title}, overlap {shown}")
    axes.set_xlabel("min-entropy (bits)")
    axes.set_ylabel("share of answers (log above 0.05)")
    axes.legend(loc="upper right")
