"""Synthetic rows and runs, for tests of code that reads runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from eval.analysis.records import Record
from eval.analysis.run import Run
from server_plugin.models.presets import preset_named


def row(index: int, first: float, second: float, *, bits: float = 1.0, **changed: Any) -> Record:
    """A sample of a two-stage run; two tokens of `bits` each."""
    made = Record(
        index=index,
        id=f"s{index}",
        image_id=f"i{index // 2}",
        question="?",
        category="",
        truth='{"answers": ["a"], "extra": {}}',
        true_box=[],
        source_width=1000,
        source_height=500,
        original_bytes=90_000,
        view_bytes=4000,
        region_bytes=3000,
        view_pixels=10_000,
        region_pixels=5_000,
        ask_bytes=50,
        request_bytes=30,
        reply_bytes=15,
        answer_bytes=40,
        first_answer_bytes=38,
        reference_bytes=10_000,
        first_text="a",
        second_text="b",
        first_score=first,
        second_score=second,
        first_tokens=[1, 2],
        second_tokens=[1, 2],
        first_min_entropy=[bits, bits],
        first_entropy=[2 * bits, 2 * bits],
        first_margin=[0.5, 0.5],
        second_min_entropy=[0.1, 0.1],
        second_entropy=[0.1, 0.1],
        second_margin=[0.9, 0.9],
        first_ended=True,
        second_ended=True,
        map=[1.0] * 4,
        map_rows=2,
        map_columns=2,
        box=[0, 0, 10, 10],
        side_px=10,
        first_mflops=100,
        look_mflops=10,
        second_mflops=90,
        first_s=0.0,
        look_s=0.0,
        second_s=0.0,
        edge_s=0.0,
    )
    return replace(made, **changed)


def run_of(
    records: list[Record],
    *,
    name: str = "run",
    method: str = "two_stage",
    task: dict[str, Any] | None = None,
    codec: int = 90,
    **model: Any,
) -> Run:
    """Make a run in memory; `model` replaces the model in its provenance."""
    told = {
        "name": "demo",
        "preset": msgspec.to_builtins(preset_named("demo")),
        "view": [100, 100],
        "visual_tokens": 64,
        "hidden_size": 192,
        "layers": 4,
        **model,
    }
    provenance = {
        "method": method,
        "task": {"name": "signs", "split": "test", "scorer": "exact", **(task or {})},
        "model": told,
        "codec": {"view": ["jpeg", codec], "region": ["jpeg", codec]},
        "machine": {"threads": 1},
    }
    return Run(folder=Path(name), provenance=provenance, records=records)
