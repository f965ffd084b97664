"""The evaluation's figure needs a results file only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from eval.demo_model.figure import ANSWERS, BOXES, METRICS, draw


def test_the_figure_is_drawn_without_a_model(tmp_path: Path) -> None:
    line = {"retransmitted": [0.0, 0.5, 1.0], "accuracy": [0.5, 0.9, 0.9], "random": [0.5, 0.7, 1]}
    height: dict[str, Any] = {"from_px": 3.0, "to_px": 4.0, "count": 5}
    figures = {
        "questions": 5,
        "settings": {"split": "val", "style": "benchmark"},
        "auroc": {"min_entropy/full": 0.9},
        "trade_offs": {"sliding": {f"{metric}/full": line for metric in METRICS}},
        "min_entropy_histogram": {"edges_bits": [0, 1, 2], "right": [3, 0], "wrong": [0, 2]},
        "box_holds_text": {
            name: {"all": 0.9, "first_wrong": 0.8, "mean_side_px": 320.0} for name in BOXES
        },
        "by_text_height": [
            {**height, **dict.fromkeys(ANSWERS, 0.5)},
            {"from_px": 4.0, "to_px": 5.0, "count": 0},
        ],
    }
    draw(figures, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1000
