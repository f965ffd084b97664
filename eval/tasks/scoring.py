"""Scorers of answers, and metrics of whole splits.

The default scorers are those of lmms-eval 0.7.3, and checked against it. Scorers named "vicrop"
are those of the evaluation script that was published with ViCrop, `get_score.py` of its repository
`mllms_know` (Zhang et al., *MLLMs Know Where to Look: Training-free Perception of Small Visual
Details with Multimodal LLMs*, 2025, arXiv 2502.17422). Published results of attention crops use
them, and they give other numbers for the same answers.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from eval.tasks.base import Scorer, Truth
from eval.tasks.normalise import textvqa_words, vqa_words

# Does not match "A plane", where the letter is an article.
_LETTER = re.compile(r"\(?([A-Z])(?:[.:)]|$)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def until(stop: Sequence[str], scorer: Scorer) -> Scorer:
    """Wrap a scorer: it sees an answer only up to the first `stop` text, stripped of blanks."""

    def score(answer: str, truth: Truth) -> float:
        return scorer(_cut(answer, stop), truth)

    return score


def _cut(answer: str, stop: Sequence[str]) -> str:
    for text in stop:
        answer = answer.split(text, 1)[0]
    return answer.strip()


# --- scorers --------------------------------------------------------------------------------


def textvqa(answer: str, truth: Truth) -> float:
    """VQA accuracy with TextVQA's normalisation.

    It is min(n / 3, 1), where n of the other annotators gave this answer, averaged over leaving out
    each annotator once.
    """
    return _leave_one_out(textvqa_words(answer), [textvqa_words(one) for one in truth.answers])


def vqav2(answer: str, truth: Truth) -> float:
    """VQA accuracy as in `textvqa`, with VQAv2's normalisation."""
    given = [vqa_words(_one_line(one)) for one in truth.answers]
    return _leave_one_out(vqa_words(_one_line(answer)), given)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, given: Sequence[str]) -> float:
    if not given:
        return 0.0
    same = sum(one == answer for one in given)
    # If the annotator left out agrees, one agreement fewer remains.
    with_agreeing = same * min((same - 1) / 3, 1.0)
    with_others = (len(given) - same) * min(same / 3, 1.0)
    return (with_agreeing + with_others) / len(given)


def aokvqa_direct(answer: str, truth: Truth) -> float:
    """min(n / 3, 1), where n of the ten annotators gave this answer.

    This is the rule of the A-OKVQA authors' `eval_predictions.py`. That script compares texts as
    they are. Here both sides are first normalised as for VQAv2, since a capital letter does not
    make an answer wrong.
    """
    return min(_agreeing(answer, truth) / 3, 1.0)


def aokvqa_choice(answer: str, truth: Truth) -> float:
    """1 if the answer names the right choice by letter ("B", "(b)", "B. umbrella") or words."""
    choices = [str(choice) for choice in truth.extra["choices"]]
    return float(chosen(answer, choices) == truth.extra["right"])


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that an answer names; None if it names none."""
    words = [vqa_words(choice) for choice in choices]
    answered = vqa_words(answer)
    # Words before letters: a choice may itself be "A" or start with a letter.
    if answered in words:
        return words.index(answered)
    letter = _LETTER.match(answer.strip().upper())
    if letter is None or (place := ord(letter[1]) - ord("A")) >= len(choices):
        return None
    return place


def ignoring_punctuation(answer: str, truth: Truth) -> float:
    """1 if the answer is right, ignoring case and punctuation: GQA's rule in lmms-eval."""
    return float(_bare(answer) == _bare(truth.answers[0]))


def _bare(text: str) -> str:
    return text.strip().lower().translate(_NO_PUNCTUATION)


def exact_word(answer: str, truth: Truth) -> float:
    """1 if the answer is exactly the right word, ignoring case: POPE's rule in lmms-eval.

    "Yes." is wrong.
    """
    return float(_word(answer) == _word(truth.answers[0]))


def _word(text: str) -> str:
    return text.lower().strip()


def normalised(answer: str, truth: Truth) -> float:
    """1 if the answer is right after VQA normalisation: the generated benchmark's rule."""
    return float(vqa_words(answer) == vqa_words(truth.answers[0]))


def vicrop_open(answer: str, truth: Truth) -> float:
    """min(0.3 n, 1), where n of the ten annotators gave this answer.

    This is ViCrop's rule for TextVQA, A-OKVQA and VQAv2. With ten annotators it equals the mean
    over leaving each one out; only the normalisation differs from `textvqa`.
    """
    return min(0.3 * _agreeing(answer, truth), 1.0)


def vicrop_within(answer: str, truth: Truth) -> float:
    """1 if the right answer is a substring of the answer: ViCrop's rule for GQA.

    So "no" matches "snow".
    """
    return float(vqa_words(truth.answers[0]) in vqa_words(answer))


def vicrop_nearest(answer: str, truth: Truth) -> float:
    """1 if, of "yes" and "no", the right one is more similar to the answer: ViCrop's POPE rule."""
    nearest = max(("yes", "no"), key=lambda word: SequenceMatcher(None, answer, word).ratio())
    return float(nearest == _word(truth.answers[0]))


def _agreeing(answer: str, truth: Truth) -> int:
    answered = vqa_words(answer)
    return sum(vqa_words(one) == answered for one in truth.answers)


# --- figures of a split ---------------------------------------------------------------------


def yes_no_figures(
    answers: Sequence[str], truths: Sequence[Truth], *, stop: Sequence[str] = ()
) -> dict[str, float]:
    """POPE's metrics, with "yes" as the positive class; answers are cut at `stop`.

    `yes_ratio` is the share of the model's answers that are yes. `pope_yes_ratio`, which lmms-eval
    reports, is the share of right answers that are yes. An answer that is neither yes nor no
    lowers the accuracy only.
    """
    predicted = [_word(_cut(answer, stop)) for answer in answers]
    right = [_word(truth.answers[0]) for truth in truths]
    pairs = list(zip(predicted, right, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = _share(hits, hits + pairs.count(("yes", "no")))
    recall = _share(hits, hits + pairs.count(("no", "yes")))
    return {
        "accuracy": _share(sum(one == other for one, other in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(predicted.count("yes"), len(predicted)),
        "pope_yes_ratio": _share(right.count("yes"), len(right)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def mean_by(
    key: str, scorer: Scorer, answers: Sequence[str], truths: Sequence[Truth]
) -> dict[str, float]:
    """Mean score for each value of `truth.extra[key]`; truths without the key are left out."""
    scores: Mapping[str, list[float]] = defaultdict(list)
    for answer, truth in zip(answers, truths, strict=True):
        if truth.extra.get(key):
            scores[str(truth.extra[key])].append(scorer(answer, truth))
    return {name: sum(found) / len(found) for name, found in sorted(scores.items())}
