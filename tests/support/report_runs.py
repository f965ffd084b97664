"""Made-up runs for tests of reports."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from eval.analysis.records import Record
from eval.analysis.run import Run
from tests.support.rows import row, run_of


def answers(count: int, seed: int = 0, kinds: tuple[str, ...] = ("",)) -> list[Record]:
    """Rows with random scores and uncertainties, of alternating kinds."""
    rng = np.random.default_rng(seed)
    truth = {"answers": ["a"], "extra": {"kind": "x", "text_size": None}}
    return [
        row(
            index,
            float(rng.random() < 0.6),
            float(rng.random() < 0.8),
            bits=float(rng.random()),
            category=kinds[index % len(kinds)],
            truth=json.dumps(truth),
            first_input_tokens=70 + index % 3,
            second_input_tokens=134,
            true_box=[10, 10, 20, 20],
        )
        for index in range(count)
    ]


KINDS = ("number", "presence", "number", "colour")


def made(**changed: Any) -> Run:
    """A run of 200 questions of three kinds; arguments as for `run_of`."""
    return run_of(answers(200, kinds=KINDS), **changed)


def others(run: Run) -> Run:
    """The run with other picture ids, so that it shares no picture with the original."""
    return replace(run, records=[replace(r, image_id=f"v{r.image_id}") for r in run.records])
