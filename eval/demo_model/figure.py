"""Draw the evaluation: ``python -m eval.demo_model.figure --results R.json --out F.png``.

Reads the results file only; no model runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "demo-model-2000.json"

METRICS = {
    "min_entropy": ("min-entropy", "#1565c0", "-"),
    "entropy": ("Shannon entropy", "#ef6c00", "--"),
    "margin": ("probability margin", "#6a1b9a", "-."),
}
ANSWERS = {
    "first": ("global view alone", "#c62828"),
    "own": ("own region, search", "#1565c0"),
    "centroid": ("own region, centroid", "#00838f"),
    "true": ("region around the true place", "#2e7d32"),
}
BOXES = {
    "sliding": "region search",
    "centroid": "centroid",
    "raw_attention": "raw attention",
    "sliding_without_epsilon": "search, no constant\nin the denominator",
    "random": "random box",
}


def trade_off(axes: Axes, figures: dict[str, Any]) -> None:
    """Accuracy over additional communication cost, with the region search's boxes."""
    curves = figures["trade_offs"]["sliding"]
    for metric, (label, colour, line) in METRICS.items():
        drawn = curves[f"{metric}/full"]
        axes.plot(
            drawn["retransmitted"],
            drawn["accuracy"],
            line,
            color=colour,
            label=label,
        )
    drawn = curves["min_entropy/full"]
    axes.plot(
        drawn["retransmitted"],
        drawn["random"],
        ":",
        color="#616161",
        label="random",
    )
    for share, word in ((0, "never"), (-1, "always")):
        x, y = drawn["retransmitted"][share], drawn["accuracy"][share]
        axes.plot([x], [y], "o", color="#212121")
        place, side = ((10, -3), "left") if share == 0 else ((0, -16), "right")
        axes.annotate(word, (x, y), place, textcoords="offset points", ha=side)
    axes.set_xlabel("additional communication cost (region px / view px, mean)")
    axes.set_ylabel("accuracy")
    axes.set_title("Sending the most unsure first (mean over the answer)")
    axes.legend(loc="center right")


def certainty(axes: Axes, figures: dict[str, Any]) -> None:
    """Uncertainty of right and of wrong first answers."""
    counts = figures["min_entropy_histogram"]
    edges = np.array(counts["edges_bits"])
    axes.stairs(counts["right"], edges, fill=True, alpha=0.5, color="#2e7d32", label="right")
    axes.stairs(counts["wrong"], edges, fill=True, alpha=0.5, color="#c62828", label="wrong")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlabel("mean min-entropy of the first answer (bits)")
    axes.set_ylabel("questions (linear up to 10)")
    axes.set_title(f"First answers, AUROC {figures['auroc']['min_entropy/full']:.3f}")
    axes.legend()


def holding(axes: Axes, figures: dict[str, Any]) -> None:
    """How often each kind of box contains the whole text."""
    rates = figures["box_holds_text"]
    where = np.arange(len(BOXES))
    for offset, which, label, colour in (
        (-0.2, "all", "all questions", "#90a4ae"),
        (0.2, "first_wrong", "first answer wrong", "#c62828"),
    ):
        bars = axes.bar(where + offset, [rates[n][which] for n in BOXES], 0.4, color=colour)
        bars.set_label(label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    names = [f"{word}\n{rates[n]['mean_side_px']:.0f} px" for n, word in BOXES.items()]
    axes.set_xticks(where, names, fontsize=8)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("box holds the whole text")
    axes.set_title("Boxes, with their mean side")
    axes.legend(loc="upper right", fontsize=8)


def heights(axes: Axes, figures: dict[str, Any]) -> None:
    """Accuracy by text height."""
    rows = [row for row in figures["by_text_height"] if row["count"]]
    where = np.arange(len(rows))
    for answer, (label, colour) in ANSWERS.items():
        axes.plot(where, [row[answer] for row in rows], "o-", color=colour, label=label)
    names = [f"{r['from_px']:g}-{r['to_px']:g}\nn={r['count']}" for r in rows]
    axes.set_xticks(where, names, fontsize=8)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("text height in the 112-px global view (px)")
    axes.set_ylabel("accuracy")
    axes.set_title("By text height")
    axes.legend(loc="lower right", fontsize=8)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Save the figure as a PNG; ``figures`` is one split of a results file."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    for axes, panel in zip(grid.flat, (trade_off, certainty, holding, heights), strict=True):
        panel(axes, figures)
        axes.grid(alpha=0.3)
    settings = figures["settings"]
    figure.suptitle(
        f"Demo model on {figures['questions']} generated scenes, {settings['split']} split, "
        f"{settings['style']} style"
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--out", type=Path, default=RESULTS.with_suffix(".png"))
    options = parser.parse_args()
    draw(json.loads(options.results.read_text())[options.split], options.out)


if __name__ == "__main__":
    main()
