"""Benchmarks: samples, prompts and scorers."""

from eval.tasks.base import Sample, Scorer, Summary, Task, Truth
from eval.tasks.catalogue import open_task, task_kind

__all__ = ["Sample", "Scorer", "Summary", "Task", "Truth", "open_task", "task_kind"]
