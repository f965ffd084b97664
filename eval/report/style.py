"""Style of figures, and saving them as reproducible files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which is safe for common colour vision deficiencies."""
MUTED = "#6b6b6b"
RIGHT, WRONG = "#0072B2", "#D55E00"

DPI = 110

_STYLE: Any = {
    # Comes with matplotlib, so it is available everywhere.
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,
    "savefig.dpi": DPI,
}


@contextlib.contextmanager
def in_style() -> Iterator[None]:
    """Apply the report's style, ignoring the user's matplotlibrc; also a decorator.

    Axes must be both created and drawn within it.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, sizes in inches. Call it within `in_style`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or PDF without metadata that would change, such as date and version."""
    nothing: dict[str, Any] = {"Software": None}
    if path.suffix == ".pdf":
        nothing = {"Creator": None, "Producer": None, "CreationDate": None}
    with in_style():
        figure.savefig(path, metadata=nothing)
