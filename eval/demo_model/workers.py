"""Run an evaluation in one process or several, with the same results."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from eval.demo_model.export import FOLDER
from eval.demo_model.measure import Reader
from eval.demo_model.questions import EvaluationSettings

T = TypeVar("T")
Work = Callable[[Reader, EvaluationSettings, list[int]], list[T]]
"""Evaluates a chunk of scene indices; a module's function, because it is pickled."""

_CHUNK = 50
_reader: Reader | None = None


def load_model(folder: Path = FOLDER) -> LlavaForConditionalGeneration:
    """Load the checkpoint in float32."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


def chunks(indices: Sequence[int]) -> list[list[int]]:
    """Split the indices into chunks whose pictures fit in memory."""
    return [list(indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]


def run_here(
    model: LlavaForConditionalGeneration, work: Work[T], settings: EvaluationSettings
) -> list[T]:
    """Evaluate all scenes of ``settings`` in this process, with a progress bar."""
    reader = Reader(model)
    results: list[T] = []
    with tqdm(total=settings.count, desc=settings.split, disable=None) as bar:
        for chunk in chunks(settings.indices()):
            results += work(reader, settings, chunk)
            bar.update(len(chunk))
    return results


def _start(folder: Path) -> None:
    global _reader
    torch.set_num_threads(1)
    _reader = Reader(load_model(folder))


def _one(work: Work[T], settings: EvaluationSettings, chunk: list[int]) -> list[T]:
    assert _reader is not None
    return work(_reader, settings, chunk)


def run_in_workers(
    folder: Path, work: Work[T], settings: EvaluationSettings, workers: int
) -> list[T]:
    """Evaluate all scenes of ``settings`` in ``workers`` processes of one thread each, in order."""
    if workers < 2:
        return run_here(load_model(folder), work, settings)
    results: list[T] = []
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _start, (folder,)) as pool,
        tqdm(total=settings.count, desc=settings.split, disable=None) as bar,
    ):
        for part in pool.map(partial(_one, work, settings), chunks(settings.indices())):
            results += part
            bar.update(len(part))
    return results
