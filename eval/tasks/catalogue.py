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
"""Benchmark classes by name. Scorers and summaries belong to the class, so a run can be scored
again without opening its data: `task_kind(name).scorers`."""


def task_kind(name: str) -> type[Task]:
    """Return the class of a benchmark.

    Raises:
        ConfigError: the name is unknown.
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
        data: local folder in the hub's layout; None loads from the hub, or generates "signs".
        split: split of the data; None for the reported one (`docs/tasks.md`).
        ocr: whether to give the model the data set's OCR tokens, which only TextVQA has.
        limit: use only the first `limit` samples. "signs" generates as many as asked for.
        post_prompt: text after each question, instead of the benchmark's own.

    Raises:
        ConfigError: unknown task, missing split or data, or an option that the task lacks.
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
