"""Fig. 11: a strongly compressed view and its region.

The figure is that of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from edge_client.picture import Picture
from eval.analysis.records import Record
from eval.analysis.run import Run
from eval.analysis.trace import rows_of
from eval.report.figures import quality_name, quality_of
from eval.report.inputs import Inputs
from eval.report.style import in_style, new_figure
from eval.tasks.base import Sample, Task
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box, Size, frame_of
from vlm_collab.pictures.images import Codec, decode

BOX = "#D55E00"
SHOWN_PX = 700
"""Longer side of the original in the figure, in px."""


def chosen_row(run: Run) -> tuple[Record, str]:
    """Choose the row that is shown.

    It is the first row whose first answer is wrong and second right, preferably with the true box
    in the region; without any such row, the first one.

    Returns:
        The row, and the rule that chose it, in words.
    """
    turned = [r for r in run.records if r.first_score < 0.5 <= r.second_score]
    covering = [r for r in turned if r.true_box and r.box and _within(r.true_box, r.box)]
    rule = "the first row whose first answer is wrong and second right"
    if covering:
        return covering[0], f"{rule}, with the true place in the region"
    if turned:
        return turned[0], f"{rule} (in none of them is the true place known to be in the region)"
    shown = [r for r in run.records if r.box] or run.records
    return shown[0], "the first row (no wrong first answer has a right second one)"


def fig11(inputs: Inputs) -> dict[str, Any]:
    """Data: the chosen row, from the run of the lowest quality."""
    run = min((inputs.main, *inputs.qualities), key=quality_of)
    row, rule = chosen_row(run)
    return {
        "title": f"View, box and region as {quality_name(run)} (Fig. 11)",
        "rows": rows_of(run) | {"count": 1, "index": str(row.index)},
        "rule": rule,
        "id": row.id,
        "question": row.question,
        "first": row.first_text,
        "second": row.second_text,
        "box": row.box,
        "view_bytes": row.view_bytes,
        "region_bytes": row.region_bytes,
    }


@in_style()
def draw_fig11(data: dict[str, Any], run: Run, task: Task) -> Figure:
    """Draw the data of `fig11`, with view and region encoded again as the edge did.

    Args:
        data: data of `fig11`.
        run: the run of the row.
        task: the run's benchmark, which has the original.

    Raises:
        ConfigError: the encoded pictures differ from those of the run.
    """
    row = next(record for record in run.records if record.id == data["id"])
    sample: Sample = task[row.index]
    picture = Picture.open(sample.picture())
    (view_codec, view_quality), (region_codec, region_quality) = (
        run.provenance["codec"][name] for name in ("view", "region")
    )
    side = Size(*run.provenance["model"]["view"])
    box = Box(*row.box)
    view = picture.view(side, run.preset.fit, Codec[view_codec.upper()], view_quality)
    local = run.preset.local_view_px
    target = side if local is None else Size(local, local)
    region = picture.region(box, target, Codec[region_codec.upper()], region_quality)
    if (sample.id, len(view), len(region)) != (row.id, row.view_bytes, row.region_bytes):
        raise ConfigError(f"{data['id']} is not the picture that {run.folder} saw")
    whole = np.asarray(picture.decoded())
    small = np.asarray(decode(view, max_pixels=side.width * side.height))
    sent = np.asarray(decode(region, max_pixels=target.width * target.height))
    frame = frame_of(picture.size, run.preset.fit, side)
    across, down = side.width / frame.width, side.height / frame.height
    edges = (
        (box.left - frame.left) * across,
        (box.top - frame.top) * down,
        box.width * across,
        box.height * down,
    )
    figure = new_figure(12.6, 3.9)
    panels = figure.subplots(1, 4)
    step = max(1, max(whole.shape[:2]) // SHOWN_PX)
    panels[0].imshow(whole[::step, ::step])
    panels[0].set_title(f"(a) original, {picture.size.width} × {picture.size.height} px")
    for axes in panels[1:3]:
        axes.imshow(small, interpolation="nearest", extent=(0, side.width, side.height, 0))
    panels[1].add_patch(
        Rectangle(edges[:2], edges[2], edges[3], fill=False, edgecolor=BOX, linewidth=2)
    )
    panels[1].set_title(f"(b) global view, {len(view):,} bytes")
    panels[2].set_xlim(edges[0], edges[0] + edges[2])
    panels[2].set_ylim(edges[1] + edges[3], edges[1])
    panels[2].set_title("(c) the box in the view")
    panels[3].imshow(sent, interpolation="nearest")
    panels[3].set_title(f"(d) local view, {len(region):,} bytes")
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
    caption = f"“{data['question']}”   first: “{data['first']}”   second: “{data['second']}”"
    figure.suptitle(f"{data['title']}\n{caption}", fontsize=10)
    return figure


def _within(inner: list[int], outer: list[int]) -> bool:
    left, top, right, bottom = inner
    return left >= outer[0] and top >= outer[1] and right <= outer[2] and bottom <= outer[3]
