"""Which split of a benchmark is reported; a note warns against choosing settings on it."""

from __future__ import annotations

from eval.tasks.catalogue import TASKS
from eval.tasks.hub import POPE, HubTask

_SHARED = {POPE.name: "all its splits show the same pictures"}
"""Tasks whose splits all have the same pictures, and why."""


def reported_split(task: str) -> str | None:
    """The split that `open_task(task)` opens; None for an unknown task."""
    kind = TASKS.get(task)
    if kind is None:
        return None
    return next(iter(kind.sources)) if issubclass(kind, HubTask) else "test"


def reported_note(task: str, split: str) -> list[str]:
    """A warning against choosing on a split that is reported or shares its pictures.

    Returns:
        One line, or none if the split is safe.
    """
    if split == reported_split(task):
        why = f"{split} is the split of {task} that is reported"
    elif task in _SHARED:
        why = f"{split} shows pictures of the split of {task} that is reported ({_SHARED[task]})"
    else:
        return []
    return [f"{why}: choose on another split, or do not report results on this one"]
