"""Panels of accuracy over cost: their data, and their drawing.

Sections and equations are those of Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.analysis.baselines import HighResolution, Oracle, retransmits
from eval.analysis.curves import Bootstrap, Criterion, Curve, area_over_random, curve, end_points
from eval.analysis.operating_points import Column, Point, two_stage_point
from eval.analysis.run import Run
from eval.analysis.statistics import finite
from eval.analysis.trace import rows_of
from eval.report.style import COLOURS, MUTED, in_style, new_figure

Panel = dict[str, Any]
"""JSON of a panel: all that is drawn, such as title, lines and marks."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A cost axis. The cost of a point is the mean of `column`, over `unit`.

    Attributes:
        label: label of the axis.
        column: the cost of each sample of a point.
        unit: the unit of the axis, from the point at which nothing is sent.
        formula: definition of the cost.
    """

    label: str
    column: Callable[[Point], Column]
    unit: Callable[[Point], float]
    formula: str

    def of(self, point: Point, never: Point) -> float:
        """The cost of a point."""
        return float(self.column(point).mean()) / self.unit(never)

    def along(self, drawn: Curve, run: Run) -> Column:
        """The cost at every point of a curve."""
        never, always = end_points(run)
        begin, end = self.column(never), self.column(always)
        more = np.concatenate([[0.0], np.cumsum((end - begin)[drawn.order])])[drawn.sent]
        return np.asarray((begin.sum() + more) / len(drawn.order) / self.unit(never))


PIXELS = Axis(
    "additional communication cost",
    lambda point: point.pixels,
    lambda never: 1.0,
    "pixels of local over pixels of global views, mean over samples (Song and Kim, section VII-A)",
)
PAPER_FLOPS = Axis(
    "relative computation cost (Eq. 17-20)",
    lambda point: point.paper_mflops,
    lambda never: float(never.paper_mflops.mean()),
    "FLOPs by Eq. 18-20 over those of first passes (Song and Kim, section VII-B)",
)
SPENT_FLOPS = Axis(
    "relative computation cost (as executed)",
    lambda point: point.mflops,
    lambda never: float(never.mflops.mean()),
    "Eq. 17 of Song and Kim applied to the tokens really computed, over first passes",
)
RELATIVE_BYTES = Axis(
    "relative communication cost (bytes over JPEG 100 views)",
    lambda point: point.picture_bytes,
    lambda never: float(never.reference_bytes.mean()),
    "bytes of pictures over those of global views as JPEG 100, totals "
    "(Song and Kim, section VII-F)",
)


def line(
    name: str,
    run: Run,
    setting: Criterion,
    axis: Axis,
    bootstrap: Bootstrap,
    *,
    band: bool = True,
) -> dict[str, Any]:
    """Data of a curve, thinned to about a hundred reachable points, with its band.

    Each point can be reproduced from its threshold `eta`; `sent` is the number of samples that it
    rejects.
    """
    drawn = curve(run, setting)
    at = drawn.thinned()
    x = axis.along(drawn, run)[at]
    data = {
        "name": name,
        "setting": setting.name,
        "rows": rows_of(run),
        "formula": axis.formula,
        "eta": drawn.eta[at].tolist(),
        "sent": drawn.sent[at].tolist(),
        "x": x.tolist(),
        "y": drawn.accuracy[at].tolist(),
        "area_over_random": area_over_random(drawn, run),
    }
    if band:
        never, _ = end_points(run)
        low, high = bootstrap.band(drawn, run, axis.column, x * axis.unit(never))
        data |= {"low": low.tolist(), "high": high.tolist()}
    return data


def mark(name: str, point: Point, axis: Axis, never: Point, run: Run) -> dict[str, Any]:
    """Data of a mark: one point of another method."""
    data = {"name": name, "rows": rows_of(run), "x": axis.of(point, never), "y": point.accuracy}
    return {**data, "note": point.note} if point.note else data


def panel(
    title: str,
    run: Run,
    lines: Sequence[dict[str, Any]],
    axis: Axis,
    *,
    hd: Run | None = None,
    eta: float | None = None,
    setting: Criterion | None = None,
) -> Panel:
    """Data of a panel: lines, and for comparison never, always, random, oracle and HD.

    Args:
        title: title of the panel.
        run: the run that gives the comparisons.
        lines: see `line`.
        axis: axis of the marks.
        hd: LLaVA-1.5-HD on the same samples.
        eta, setting: threshold and criterion that were chosen on other data.
    """
    never, always = end_points(run)
    marks = [mark("oracle", Oracle().points(run)[0], axis, never, run)]
    if eta is not None and setting is not None:
        chosen = two_stage_point(run, sent_at(run, setting, eta), "chosen")
        marks.append({**mark("η from val", chosen, axis, never, run), "eta": eta})
    if hd is not None:
        marks.append(mark("HD", HighResolution().points(hd)[0], axis, never, hd))
    known = [one for one in marks if math.isfinite(one["x"])]
    return {
        "title": title,
        "rows": rows_of(run),
        "lines": list(lines),
        "marks": known,
        "random": {
            "x": [finite(axis.of(never, never)), finite(axis.of(always, never))],
            "y": [never.accuracy, always.accuracy],
        },
    }


def sent_at(run: Run, setting: Criterion, eta: float) -> Column:
    """1 for samples that the policy with this threshold sends, else 0; calls the policy itself."""
    policy = setting.policy(eta)
    return np.array([retransmits(policy, record) for record in run.records], dtype=np.float64)


@in_style()
def draw_panels(data: dict[str, Any]) -> Figure:
    """Draw a figure of panels from its data."""
    panels = data["panels"]
    columns = min(len(panels), data.get("columns", 3))
    rows = -(-len(panels) // columns)
    width = 6.5 if data.get("wide") else 0.4 + 4.1 * columns
    figure = new_figure(width, 0.8 + (4.2 if data.get("wide") else 3.3) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.axis("off")
            continue
        _draw(axes, panels[place], data)
        if place % columns == 0:
            axes.set_ylabel(data["y_label"])
    if not data.get("direct"):
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(data["title"], fontsize=11)
    return figure


def _draw(axes: Axes, shown: Panel, data: dict[str, Any]) -> None:
    for place, one in enumerate(shown["lines"]):
        colour = COLOURS[place % len(COLOURS)]
        style = ("-", "--", "-.", ":")[place % 4] if data.get("dashed") else "-"
        axes.plot(one["x"], one["y"], style, color=colour, label=one["name"], zorder=3)
        if data.get("direct"):
            best = int(np.argmax(one["y"]))
            axes.annotate(
                one["name"],
                (one["x"][best], one["y"][best]),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
        if "low" in one and place in data.get("bands", (0,)):
            axes.fill_between(one["x"], one["low"], one["high"], color=colour, alpha=0.15, lw=0)
    random = shown.get("random")
    if random is not None and None not in random["x"]:
        (begin, end), (never, always) = random["x"], random["y"]
        axes.plot([begin, end], [never, always], ":", color=MUTED, label="random (expected)")
        rises = never <= always
        for level, word, low in ((never, "initial", rises), (always, "full", not rises)):
            axes.axhline(level, color=MUTED, linewidth=0.7, alpha=0.7)
            axes.annotate(
                f"{word} {level:.3f}",
                (1.0, level),
                (-2, -3 if low else 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="top" if low else "bottom",
                fontsize=7.5,
                color=MUTED,
            )
    _limits(axes, shown)
    for one in shown["marks"]:
        _mark(axes, one)
    axes.set_title(f"{shown['title']} (n = {shown['rows']['count']})")
    axes.set_xlabel(data["x_label"])


def _limits(axes: Axes, shown: Panel) -> None:
    """Fit the vertical axis to the curves; marks far outside do not stretch it."""
    values = [y for one in shown["lines"] for y in (*one["y"], *one.get("low", ()))]
    values += [y for one in shown["lines"] for y in one.get("high", ())]
    values += [one["y"] for one in shown["marks"] if one["name"] != "HD"]
    low, high = min(values), max(values)
    room = max(high - low, 0.02)
    axes.set_ylim(low - 0.12 * room, high + 0.08 * room)


def _mark(axes: Axes, one: dict[str, Any]) -> None:
    shape, colour, size, place = _MARKS[one["name"]]
    (bottom, top), name, y = axes.get_ylim(), one["name"], one["y"]
    if not bottom <= y <= top:
        name = f"{name} {y:.2f} {'↓' if y < bottom else '↑'}"
        y = min(max(y, bottom + 0.04 * (top - bottom)), top - 0.04 * (top - bottom))
        place = (-6, 3)
    axes.plot([one["x"]], [y], shape, color=colour, markersize=size, zorder=4)
    side = "left" if place[0] > 0 else "right"
    axes.annotate(
        name, (one["x"], y), place, textcoords="offset points", ha=side, fontsize=7.5, color=colour
    )


_MARKS = {
    "oracle": ("*", MUTED, 9, (6, 3)),
    "HD": ("D", COLOURS[3], 6, (6, 3)),
    "η from val": ("o", "#000000", 5, (6, -9)),
}
