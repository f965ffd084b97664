"""Figure of answered questions: where the model looked, and what was sent."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from edge_client.answer import EdgeAnswer
from edge_client.cli.output import shown_text
from vlm_collab.geometry import Frame
from vlm_collab.protocol.messages import Fallback

SURE_COLOUR = "#2e7d32"
UNSURE_COLOUR = "#c62828"
BYTES_COLOUR = "#37474f"
HEAT_COLOUR = "#d500f9"
BOX_COLOUR = "#00e5ff"
SHOWN_PX = 900
"""Longer side of the picture in the figure, in px; more would only make the file larger."""


@dataclass(frozen=True, slots=True)
class DrawnQuestion:
    """One answered question, ready to draw.

    Attributes:
        picture: the upright original, RGB.
        question, answer: the question, and its answer.
        frame: the part of the original that the token grid covers.
        local: the local view as it was sent; None if no region was sent.
    """

    picture: Image.Image
    question: str
    answer: EdgeAnswer
    frame: Frame
    local: Image.Image | None


def draw(questions: Sequence[DrawnQuestion], path: Path) -> None:
    """Save a figure with one row for each question.

    Each row shows the original with heat map and box, the local view as sent, and a summary in
    words with a bar that compares the bytes sent with the size of the original file.

    Args:
        questions: at least one.
        path: a PNG file in an existing folder.
    """
    figure = Figure(figsize=(13, 4.6 * len(questions)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(questions), 3, squeeze=False, gridspec_kw={"width_ratios": (1.35, 1.0, 1.25)}
    )
    for row, one in zip(panels, questions, strict=True):
        _original(row[0], one)
        _local(row[1], one)
        _summary(row[2], one)
    figure.savefig(path, dpi=90, bbox_inches="tight", pad_inches=0.15)


def _original(panel: Axes, question: DrawnQuestion) -> None:
    picture, answer, frame = question.picture, question.answer, question.frame
    shown = picture.copy()
    shown.thumbnail((SHOWN_PX, SHOWN_PX))
    panel.imshow(np.asarray(shown), extent=(0, picture.width, picture.height, 0))
    if answer.map is not None:
        heat = np.frombuffer(answer.map, np.uint8).reshape(answer.rows, answer.columns)
        panel.imshow(
            heat,
            cmap=ListedColormap([HEAT_COLOUR]),
            alpha=heat / 255 * 0.6,  # no colour where the model does not look
            interpolation="nearest",
            extent=(
                frame.left,
                frame.left + frame.width,
                frame.top + frame.height,
                frame.top,
            ),
        )
    if answer.box is not None:
        left, top, _, _ = answer.box
        panel.add_patch(
            Rectangle(
                (left, top),
                answer.box.width,
                answer.box.height,
                fill=False,
                edgecolor=BOX_COLOUR,
                linewidth=2.5,
            )
        )
    panel.set_xlim(0, picture.width)
    panel.set_ylim(picture.height, 0)
    panel.set_title(f"the original, {picture.width} × {picture.height} px", fontsize=10)
    panel.axis("off")


def _local(panel: Axes, question: DrawnQuestion) -> None:
    panel.axis("off")
    if question.local is None:
        panel.text(0.5, 0.5, "no region was needed", ha="center", va="center", fontsize=11)
        return
    panel.imshow(np.asarray(question.local), interpolation="nearest")
    width, height = question.local.size
    panel.set_title(f"the region as sent, {width} × {height} px", fontsize=10)


def _summary(panel: Axes, question: DrawnQuestion) -> None:
    answer = question.answer
    panel.axis("off")
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    text = textwrap.fill(question.question, 40)
    panel.text(0, 0.97, text, fontsize=13, fontweight="bold", va="top")
    lines = []
    if answer.box is not None:
        lines.append((f"first answer: {shown_text(answer.first_text)}", UNSURE_COLOUR))
        lines.append((f"uncertainty {answer.first_uncertainty:.2f} bits: look closer", "black"))
        box = answer.box
        lines.append((f"region {box.width} × {box.height} px at ({box.left}, {box.top})", "black"))
        if answer.refined:
            # Black: only the number below says whether this answer is the surer one.
            lines.append((f"refined answer: {shown_text(answer.text)}", "black"))
        else:
            lines.append((f"first answer kept: {_words(answer.fallback)}", UNSURE_COLOUR))
    elif answer.fallback is Fallback.NONE:
        lines.append((f"answer: {shown_text(answer.text)}", SURE_COLOUR))
    else:
        lines.append((f"answer: {shown_text(answer.text)}", UNSURE_COLOUR))
        lines.append((f"the first one: {_words(answer.fallback)}", UNSURE_COLOUR))
    if answer.box is None or answer.refined:
        lines.append((f"uncertainty {answer.uncertainty:.3f} bits", "black"))
    for number, (line, colour) in enumerate(lines):
        panel.text(0, 0.76 - 0.095 * number, line, fontsize=12, color=colour, va="top")
    if answer.original_bytes:
        share = answer.bytes_up / answer.original_bytes
        panel.add_patch(Rectangle((0, 0.08), 1, 0.07, color="#cfd8dc"))
        panel.add_patch(Rectangle((0, 0.08), min(1.0, share), 0.07, color=BYTES_COLOUR))
        panel.text(
            0,
            0.06,
            f"sent {answer.bytes_up:,} of {answer.original_bytes:,} bytes ({share:.1%})",
            fontsize=11,
            va="top",
        )


def _words(fallback: Fallback) -> str:
    return fallback.name.lower().replace("_", " ")
