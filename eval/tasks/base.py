"""Interface of benchmarks: samples, and scorers of answers.

A scorer needs only an answer and the sample's `Truth`. A run keeps both, so it can be scored again
by another scorer, without pictures and model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlm_collab.geometry import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The right answers to a question.

    Attributes:
        answers: right answers; with several annotators, one for each.
        extra: other JSON data that a scorer needs, such as the choices of a multiple-choice
            question.
    """

    answers: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: unique in its task and split.
        image_id: the same for all questions about one picture; bootstraps are clustered by it.
        question: the question with the texts that the task adds before and after it (OCR tokens,
            "Answer the question using …").
        truth: the right answers.
        picture: returns the bytes of the original file.
        category: kind of question, for separate figures; "" for none.
        true_box: where the answer can be seen, in px of the upright original; None if unknown.
    """

    id: str
    image_id: str
    question: str
    truth: Truth
    picture: Callable[[], bytes]
    category: str = ""
    true_box: Box | None = None


Scorer = Callable[[str, Truth], float]
"""Returns the score of an answer, 0 to 1."""

Summary = Callable[[Sequence[str], Sequence[Truth]], Mapping[str, float]]
"""Returns metrics of a whole split that are not a mean of scores, such as POPE's F1."""


class Task(ABC):
    """One benchmark, opened at one split.

    Attributes:
        name: name for `--task`.
        split: the opened split.
        max_new_tokens: the benchmark's longest answer, in tokens.
        stop: texts at which an answer ends; scorers ignore what follows.
        default_scorer: name of the scorer that is used unless another is named.
        scorers: scorers by name.
        summaries: metrics of a whole split, by name.
        sets: splits that are reported side by side, as sets of one benchmark.
        settings: all other settings that change the samples (OCR, prompt, data revision), for a
            run's provenance.
    """

    name: ClassVar[str]
    split: str
    max_new_tokens: int
    stop: Sequence[str] = ()
    default_scorer: str
    scorers: Mapping[str, Scorer]
    summaries: Mapping[str, Summary] = {}
    sets: ClassVar[Sequence[str]] = ()
    settings: Mapping[str, Any] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return a sample, in the order of the data. `Sample.picture` reads the picture later."""
