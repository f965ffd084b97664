"""What a benchmark is to the harness: samples, and scorers of answers.

A scorer looks at nothing but an answer and its sample's `Truth`, both of which a run keeps, so a
run can be scored again, by another rule, without the pictures and without the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlm_collab.geometry import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What an answer is held against.

    Attributes:
        answers: right answers; of several annotators, each one's.
        extra: what else a scorer needs, such as the choices of a multiple-choice question; JSON.
    """

    answers: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: unique in its task and split.
        image_id: the same for all questions about one picture; bootstraps are clustered by it.
        question: what the model is asked, with everything that the task puts before and behind
            the annotators' question (OCR tokens, "Answer the question using …").
        truth: what answers are held against.
        picture: gives the original's file.
        category: a kind of question to report apart; "" for none.
        true_box: where the answer can be seen, in px of the upright original, where that is
            known.
    """

    id: str
    image_id: str
    question: str
    truth: Truth
    picture: Callable[[], bytes]
    category: str = ""
    true_box: Box | None = None


Scorer = Callable[[str, Truth], float]
"""How right an answer is, from 0 to 1."""

Summary = Callable[[Sequence[str], Sequence[Truth]], Mapping[str, float]]
"""Figures of a whole split that are no mean of scores, such as POPE's F1."""


class Task(ABC):
    """One benchmark, opened at one split.

    Attributes:
        name: as in `--task`.
        split: of the data.
        max_new_tokens: longest answer that the benchmark asks for.
        stop: texts at which an answer ends; the scorers cut there.
        default_scorer: name of the rule that is reported unless another one is named.
        scorers: rules by name.
        summaries: figures of a whole split, by name.
        sets: splits that are reported side by side, as sets of one benchmark.
        settings: everything else that changes the samples (OCR, prompt, data revision); goes
            into a run's provenance.
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
        """A sample, in the order of the data. The picture is read when it is asked for."""
