"""All benchmarks by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.tasks.base import Task
from eval.tasks.hub import AOKVQA, GQA, POPE, AOKVQAChoice, TextVQA, VQAv2
from eval.tasks.signs import Signs
from vlm_collab.errors import ConfigError

TASKS: Mapping[str, type[Task]] = {
    kind.name: kind for kind in (TextVQA, POPE, GQA, AOKVQA, AOKVQAChoice, VQAv2, Signs)
}
"""The classes. Scorers and summaries are the class's, so that a run is scored again without
opening its data: `task_kind(name).scorers`."""


def task_kind(name: str) -> type[Task]:
    """The class of a benchmark.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name]


def open_task(
    name: str,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    ocr: bool = False,
    limit: int | None = None,
    post_prompt: str | None = None,
) -> Task:
    """Open a benchmark.

    Args:
        name: "textvqa", "pope", "gqa", "aokvqa", "aokvqa_mc", "vqav2" or "signs" (generated).
        data: a local folder of the hub's layout; None takes the hub's, or makes the generated
            ones on the spot.
        split: of the data; None for the one that is reported (`docs/tasks.md`).
        ocr: give the model the data set's OCR tokens, which only TextVQA has.
        limit: only the first so many samples. Of "signs" there are as many as are asked for.
        post_prompt: what comes behind each question instead of the benchmark's own words.

    Raises:
        ConfigError: no such task, split or data, or an option that it does not take.
    """
    kind = task_kind(name)
    options: dict[str, Any] = {"split": split, "limit": limit}
    options["data"] = None if data is None else Path(data).expanduser()
    if kind is TextVQA:
        options["ocr"] = ocr
    elif ocr:
        raise ConfigError(f"{name} has no OCR tokens; only textvqa has")
    if post_prompt is not None:
        if kind is Signs:
            raise ConfigError("signs takes no post prompt: its questions stand alone")
        options["post_prompt"] = post_prompt
    return kind(**options)
