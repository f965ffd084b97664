"""Prompts, splits and scores, compared with a table that lmms-eval 0.7.3's own functions made.

The table names the command that makes it. If lmms-eval can be imported, the table is compared with
a new one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, config

from eval.tasks import Task, Truth, open_task, task_kind
from eval.tasks.hub import HubTask
from eval.tasks.normalise import textvqa_words, vqa_words

FILE = Path(__file__).with_name("lmms_eval_0_7_3.json")
TABLE: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PICTURE = {"bytes": b"as it is", "path": "a.jpg"}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """Opens a task on rows of the table, written to Parquet files."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def open_on(name: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> Task:
        kind = task_kind(name)
        assert issubclass(kind, HubTask)
        source = next(iter(kind.sources.values()))
        folder = tmp_path / (source.config or "data")
        folder.mkdir(exist_ok=True)
        shown = [*rows] if name == "gqa" else [{**row, "image": PICTURE} for row in rows]
        Dataset.from_list(shown).to_parquet(folder / f"{source.split}-00000-of-00001.parquet")
        if name == "gqa":
            pictures = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
            pictures.parent.mkdir(exist_ok=True)
            images = sorted({row["imageId"] for row in rows})
            Dataset.from_list([{"id": i, "image": PICTURE} for i in images]).to_parquet(pictures)
        return open_task(name, data=tmp_path, **options)

    return open_on


@pytest.mark.parametrize("place", range(0, len(TABLE["words"]), 50))
def test_words_are_normalised_as_in_lmms_eval(place: int) -> None:
    for text, textvqa, vqav2 in TABLE["words"][place : place + 50]:
        assert textvqa_words(text) == textvqa
        assert vqa_words(text) == vqav2


@pytest.mark.parametrize("name", ["textvqa", "vqav2", "gqa"])
def test_prompts_and_scores_equal_lmms_eval_s(name: str, opened: Callable[..., Task]) -> None:
    entries = TABLE[name]
    task = opened(name, [entry["row"] for entry in entries])
    scorer = task.scorers[task.default_scorer]
    assert len(task) == len(entries)
    seen = set()
    for sample, entry in zip(task, entries, strict=True):
        assert sample.question == entry["prompt"]
        for answer, score in entry["scores"]:
            assert scorer(answer, sample.truth) == pytest.approx(score, abs=1e-12), answer
            seen.add(round(score, 2))
    # The table has right, wrong and partly right answers, so it can tell scorers apart.
    assert {0.0, 1.0} <= seen
    assert name == "gqa" or len(seen) > 4


def test_textvqa_s_prompt_with_ocr_tokens_equals_lmms_eval_s(opened: Callable[..., Task]) -> None:
    entries = TABLE["textvqa"]
    task = opened("textvqa", [entry["row"] for entry in entries], ocr=True)
    for sample, entry in zip(task, entries, strict=True):
        assert sample.question == entry["prompt_ocr"] != entry["prompt"]


def test_pope_s_prompts_scores_and_metrics_equal_lmms_eval_s(opened: Callable[..., Task]) -> None:
    entry = TABLE["pope"]
    task = opened("pope", entry["rows"])
    samples = list(task)
    assert [sample.question for sample in samples] == entry["prompts"]
    scorer = task.scorers[task.default_scorer]
    scores = [scorer(a, s.truth) for a, s in zip(entry["answers"], samples, strict=True)]
    assert scores == entry["scores"]
    figures = task.summaries["pope"](entry["answers"], [sample.truth for sample in samples])
    theirs = entry["figures"]
    assert figures["accuracy"] == pytest.approx(theirs["pope_accuracy"])
    assert figures["precision"] == pytest.approx(theirs["pope_precision"])
    assert figures["recall"] == pytest.approx(theirs["pope_recall"])
    assert figures["f1"] == pytest.approx(theirs["pope_f1_score"])
    assert figures["pope_yes_ratio"] == pytest.approx(theirs["pope_yes_ratio"])
    # Unlike `pope_yes_ratio`, `yes_ratio` counts the model's answers.
    predicted = [answer.strip().lower() for answer in entry["answers"]]
    ratio = predicted.count("yes") / len(predicted)
    assert figures["yes_ratio"] == ratio != theirs["pope_yes_ratio"]


@pytest.mark.parametrize("name", sorted(TABLE["settings"]))
def test_splits_configurations_and_lengths_equal_lmms_eval_s(name: str) -> None:
    theirs, kind = TABLE["settings"][name], task_kind(name)
    assert issubclass(kind, HubTask)
    split, source = next(iter(kind.sources.items()))
    assert split == source.split == theirs["test_split"]
    assert source.config == theirs["dataset_name"]
    # lmms-eval 0.7.3 reads copies of the same data sets under another owner.
    assert source.repository.split("/")[1] == theirs["dataset_path"].split("/")[1]
    longest = theirs["generation_kwargs"].get("max_new_tokens")
    assert longest is None if name == "textvqa" else kind.max_new_tokens == longest
    assert theirs["default"] == {"pre_prompt": "", "post_prompt": kind.post_prompt}
    assert list(kind.stop) == theirs["generation_kwargs"].get("until", ["\n\n"])


def test_an_answer_ends_at_its_task_s_stop_text() -> None:
    textvqa, pope = task_kind("textvqa").scorers["vqa"], task_kind("pope").scorers["exact"]
    truth = Truth(answers=("stop",) * 10)
    assert textvqa("stop ASSISTANT: go", truth) == 1.0
    assert textvqa("stop go", truth) == 0.0
    assert pope(" Yes\n\nIt is there.", Truth(answers=("yes",))) == 1.0
    assert pope("Yes. It is there.", Truth(answers=("yes",))) == 0.0


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (docs/tasks.md); the table stands for it",
)
def test_lmms_eval_reproduces_the_table() -> None:
    from eval.tasks.against_lmms_eval import table

    made = json.loads(json.dumps(table()))
    if made["lmms_eval"] != TABLE["lmms_eval"]:
        pytest.skip(f"the table is of {TABLE['lmms_eval']}, here is {made['lmms_eval']}")
    assert made == TABLE
