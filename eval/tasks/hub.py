"""The public benchmarks: splits and prompts, from the hub or from a folder in its layout.

Prompts, splits, answer lengths and scorers are those of the tasks of the same names in lmms-eval
0.7.3, read from its task files and checked against its functions. It has no task A-OKVQA. The
scorers of A-OKVQA are close to the authors' own (docs/tasks.md), and its prompts are those that
lmms-eval uses for open and multiple-choice questions elsewhere.
"""

from __future__ import annotations

import ast
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from eval.tasks import scoring
from eval.tasks.base import Sample, Scorer, Summary, Task, Truth
from eval.tasks.data import Source, Table, open_table
from eval.tasks.scoring import until
from vlm_collab.errors import ConfigError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_PARAGRAPH = ("\n\n",)
"""lmms-eval's default end of an answer."""


def _rules(stop: Sequence[str], **scorers: Scorer) -> Mapping[str, Scorer]:
    return {name: until(stop, scorer) for name, scorer in scorers.items()}


class HubTask(Task):
    """A benchmark whose rows are on the hub.

    Args:
        data: folder in the same layout; None for the hub.
        split: one of `sources`; None for the first.
        limit: use only the first `limit` samples; None for all.
        post_prompt: text after each question, instead of the benchmark's own, like lmms-eval's
            `post_prompt`; for models whose template already says how to answer.

    Raises:
        ConfigError: unknown split, missing data, or a limit below 1.
    """

    sources: ClassVar[Mapping[str, Source]]
    withheld: ClassVar[frozenset[str]] = frozenset()
    """Existing splits without public answers."""
    columns: ClassVar[tuple[str, ...]]
    post_prompt: ClassVar[str] = SHORT

    def __init__(
        self,
        *,
        data: Path | None = None,
        split: str | None = None,
        limit: int | None = None,
        post_prompt: str | None = None,
    ) -> None:
        split = next(iter(self.sources)) if split is None else split
        if split not in self.sources:
            hidden = split in self.withheld
            why = f"the answers of {split!r} are not public" if hidden else f"no split {split!r}"
            raise ConfigError(f"{self.name}: {why}; there are: {', '.join(self.sources)}")
        if limit is not None and limit < 1:
            raise ConfigError(f"{self.name}: the limit must be at least 1, not {limit}")
        self.split = split
        self._suffix = self.post_prompt if post_prompt is None else post_prompt
        self._table = self._open(self.sources[split], data)
        chosen = self._chosen()
        self._indices = chosen if limit is None else chosen[:limit]
        self.settings = {
            "data": self._table.origin,
            "post_prompt": self._suffix,
            **self._more_settings(),
        }

    def _open(self, source: Source, data: Path | None) -> Table:
        return open_table(source, data=data, columns=self.columns)

    def _chosen(self) -> Sequence[int]:
        """Indices of the rows that are samples."""
        return range(len(self._table))

    def _more_settings(self) -> Mapping[str, Any]:
        return {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._table[self._indices[index]], self._indices[index])

    @abstractmethod
    def _sample(self, row: Mapping[str, Any], index: int) -> Sample: ...


class TextVQA(HubTask):
    """TextVQA: reading text in photographs, ten annotators.

    lmms-eval sets no longest answer; 64 tokens is this project's choice. With `ocr`, the data set's
    OCR tokens follow the question, as in "TextVQA+OCR" of Song and Kim, *Collaborative
    Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349), section VII-B.
    """

    name = "textvqa"
    sources = {  # noqa: RUF012
        name: Source("lmms-lab/textvqa", name) for name in ("validation", "train")
    }
    withheld = frozenset({"test"})
    columns = ("question_id", "image_id", "question", "answers", "ocr_tokens")
    max_new_tokens = 64
    stop = ("ASSISTANT:",)
    default_scorer = "vqa"
    scorers = _rules(stop, vqa=scoring.textvqa, vicrop=scoring.vicrop_open)

    def __init__(self, *, ocr: bool = False, **options: Any) -> None:
        self._ocr = ocr
        super().__init__(**options)

    def _more_settings(self) -> Mapping[str, Any]:
        return {"ocr": self._ocr}

    def _sample(self, row: Mapping[str, Any], index: int) -> Sample:
        # "What does IBM make" loses its capitals, as in lmms-eval.
        question = str(row["question"]).capitalize()
        if self._ocr:
            question += f"\nReference OCR token: {', '.join(row['ocr_tokens'])}"
        return Sample(
            id=str(row["question_id"]),
            image_id=str(row["image_id"]),
            question=question + self._suffix,
            truth=Truth(answers=tuple(row["answers"])),
            picture=partial(self._table.picture, index),
        )


class POPE(HubTask):
    """POPE: is there such an object? Half of the answers are yes.

    The absent objects are random, popular, or often seen together with present ones (adversarial).
    The split "test" holds all three sets; a sample's category is its set.
    """

    name = "pope"
    sets = ("adversarial", "popular", "random")
    sources = {"test": Source("lmms-lab/POPE", "test")} | {
        kind: Source("lmms-lab/POPE", kind, "Full") for kind in ("random", "popular", "adversarial")
    }
    columns = ("question_id", "question", "answer", "image_source", "category")
    max_new_tokens = 128
    stop = _PARAGRAPH
    default_scorer = "exact"
    scorers = _rules(stop, exact=scoring.exact_word, vicrop=scoring.vicrop_nearest)
    summaries: Mapping[str, Summary] = {"pope": partial(scoring.yes_no_figures, stop=_PARAGRAPH)}

    def _sample(self, row: Mapping[str, Any], index: int) -> Sample:
        return Sample(
            # Each of the three sets counts its questions from 1.
            id=f"{row['category']}-{row['question_id']}",
            image_id=str(row["image_source"]),
            question=str(row["question"]).strip() + self._suffix,
            truth=Truth(answers=(str(row["answer"]),)),
            picture=partial(self._table.picture, index),
            category=str(row["category"]),
        )


class GQA(HubTask):
    """GQA: questions composed from scene graphs, with one right answer.

    Questions and pictures are in two configurations of the data set.
    """

    name = "gqa"
    sources = {  # noqa: RUF012
        split: Source("lmms-lab/GQA", split, f"{split}_balanced_instructions")
        for split in ("testdev", "val", "train")
    }
    columns = ("id", "imageId", "question", "answer")
    max_new_tokens = 16
    stop = _PARAGRAPH
    default_scorer = "exact"
    scorers = _rules(stop, exact=scoring.ignoring_punctuation, vicrop=scoring.vicrop_within)

    def _open(self, source: Source, data: Path | None) -> Table:
        shown = Source(source.repository, source.split, f"{source.split}_balanced_images")
        self._shown = open_table(shown, data=data, columns=("id",))
        self._place = {str(name): row for row, name in enumerate(self._shown.column("id"))}
        return open_table(source, data=data, columns=self.columns, image=None)

    def _sample(self, row: Mapping[str, Any], index: int) -> Sample:
        image = str(row["imageId"])
        return Sample(
            id=str(row["id"]),
            image_id=image,
            question=str(row["question"]) + self._suffix,
            truth=Truth(answers=(str(row["answer"]),)),
            picture=partial(self._picture, image),
            category=str((row.get("types") or {}).get("structural") or ""),
        )

    def _picture(self, image: str) -> bytes:
        if image not in self._place:
            raise ConfigError(f"gqa: the data hold no picture {image}")
        return self._shown.picture(self._place[image])


class VQAv2(HubTask):
    """VQAv2: questions about photographs, ten annotators; the category is the kind of answer."""

    name = "vqav2"
    sources = {"validation": Source("lmms-lab/VQAv2", "validation")}  # noqa: RUF012
    withheld = frozenset({"test", "testdev"})
    columns = ("question_id", "image_id", "question", "answers", "answer_type")
    max_new_tokens = 16
    stop = _PARAGRAPH
    default_scorer = "vqa"
    scorers = _rules(stop, vqa=scoring.vqav2, vicrop=scoring.vicrop_open)

    def _sample(self, row: Mapping[str, Any], index: int) -> Sample:
        return Sample(
            id=str(row["question_id"]),
            image_id=str(row["image_id"]),
            question=str(row["question"]) + self._suffix,
            truth=Truth(answers=tuple(str(given["answer"]) for given in row["answers"])),
            picture=partial(self._table.picture, index),
            category=str(row["answer_type"]),
        )


class AOKVQA(HubTask):
    """A-OKVQA: questions that need world knowledge, answered in words; ten annotators.

    Questions that the authors mark as too hard without choices are left out. Copies of the authors'
    evaluation script differ in where they do so (docs/tasks.md).
    """

    name = "aokvqa"
    sources = {  # noqa: RUF012
        split: Source("HuggingFaceM4/A-OKVQA", split) for split in ("validation", "train")
    }
    withheld = frozenset({"test"})
    columns = (
        "question_id", "question", "choices", "correct_choice_idx", "direct_answers",
        "difficult_direct_answer",
    )  # fmt: skip
    max_new_tokens = 16
    stop = _PARAGRAPH
    default_scorer = "direct"
    scorers = _rules(stop, direct=scoring.aokvqa_direct, vicrop=scoring.vicrop_open)

    def _chosen(self) -> Sequence[int]:
        hard = self._table.column("difficult_direct_answer")
        return [index for index, too_hard in enumerate(hard) if not too_hard]

    def _sample(self, row: Mapping[str, Any], index: int) -> Sample:
        return Sample(
            id=str(row["question_id"]),
            image_id=self._table.picture_key(index),
            question=self._question(row) + self._suffix,
            truth=self._truth(row),
            picture=partial(self._table.picture, index),
        )

    def _question(self, row: Mapping[str, Any]) -> str:
        return str(row["question"])

    def _truth(self, row: Mapping[str, Any]) -> Truth:
        return Truth(answers=tuple(str(answer) for answer in _listed(row["direct_answers"])))


class AOKVQAChoice(AOKVQA):
    """A-OKVQA as multiple choice: four choices, answered with a letter."""

    name = "aokvqa_mc"
    post_prompt = LETTER
    default_scorer = "choice"
    scorers = _rules(_PARAGRAPH, choice=scoring.aokvqa_choice)

    def _chosen(self) -> Sequence[int]:
        return range(len(self._table))

    def _question(self, row: Mapping[str, Any]) -> str:
        lines = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(_listed(row["choices"]))]
        return "\n".join([str(row["question"]), *lines])

    def _truth(self, row: Mapping[str, Any]) -> Truth:
        choices, right = (
            [str(choice) for choice in _listed(row["choices"])],
            row["correct_choice_idx"],
        )
        return Truth(answers=(choices[right],), extra={"choices": choices, "right": right})


def _listed(value: Any) -> Sequence[Any]:
    """Parse a list; the hub's copy of A-OKVQA has some as Python source text."""
    if not isinstance(value, str):
        return list(value)
    try:
        return list(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        raise ConfigError(f"aokvqa: {value[:60]!r} is not a list of answers") from None
