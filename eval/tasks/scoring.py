"""How right answers are, and figures of whole splits.

The default rules are lmms-eval's (0.7.3), and checked against it. Those named "vicrop" are the
rules of the evaluation script that ViCrop (reference [11] of 003_92b41fe49395ce1a.txt) was
published with, `get_score.py` of its repository `mllms_know`; published figures of attention
crops were counted with them, and they give other numbers for the same answers.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from eval.tasks.base import Scorer, Truth
from eval.tasks.normalise import textvqa_words, vqa_words

# Not "A plane": there it is an article.
_LETTER = re.compile(r"\(?([A-Z])(?:[.:)]|$)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def until(stop: Sequence[str], scorer: Scorer) -> Scorer:
    """A scorer that sees an answer only up to the first of the `stop` texts, without blanks."""

    def score(answer: str, truth: Truth) -> float:
        return scorer(_cut(answer, stop), truth)

    return score


def _cut(answer: str, stop: Sequence[str]) -> str:
    for text in stop:
        answer = answer.split(text, 1)[0]
    return answer.strip()


# --- scorers --------------------------------------------------------------------------------


def textvqa(answer: str, truth: Truth) -> float:
    """VQA accuracy with TextVQA's normalisation: min(n / 3, 1) over all but one annotator,
    averaged over who is left out; n is how many of them gave this answer."""
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
    # Leaving out one who agrees leaves one agreement fewer.
    with_agreeing = same * min((same - 1) / 3, 1.0)
    with_others = (len(given) - same) * min(same / 3, 1.0)
    return (with_agreeing + with_others) / len(given)


def aokvqa_direct(answer: str, truth: Truth) -> float:
    """min(n / 3, 1) over all ten annotators, the rule of the A-OKVQA authors' own
    `eval_predictions.py`. That compares texts as they are; here both sides are normalised as for
    VQAv2 first, since a model's capital letter is no wrong answer."""
    return min(_agreeing(answer, truth) / 3, 1.0)


def aokvqa_choice(answer: str, truth: Truth) -> float:
    """1 for the right choice: by its letter ("B", "(b)", "B. umbrella"), else by its words."""
    choices = [str(choice) for choice in truth.extra["choices"]]
    return float(chosen(answer, choices) == truth.extra["right"])


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Which of `choices` an answer names, from 0; None if none."""
    words = [vqa_words(choice) for choice in choices]
    said = vqa_words(answer)
    # Words before letters: the choice may itself be "A" or start with one.
    if said in words:
        return words.index(said)
    letter = _LETTER.match(answer.strip().upper())
    if letter is None or (place := ord(letter[1]) - ord("A")) >= len(choices):
        return None
    return place


def ignoring_punctuation(answer: str, truth: Truth) -> float:
    """1 if it is the right answer but for case and punctuation: GQA's rule in lmms-eval."""
    return float(_bare(answer) == _bare(truth.answers[0]))


def _bare(text: str) -> str:
    return text.strip().lower().translate(_NO_PUNCTUATION)


def exact_word(answer: str, truth: Truth) -> float:
    """1 for the very word, but for case: POPE's rule in lmms-eval. "Yes." is wrong."""
    return float(_word(answer) == _word(truth.answers[0]))


def _word(text: str) -> str:
    return text.lower().strip()


def normalised(answer: str, truth: Truth) -> float:
    """1 if it is the right answer after the VQA normalisation: the generated benchmark's rule."""
    return float(vqa_words(answer) == vqa_words(truth.answers[0]))


def vicrop_open(answer: str, truth: Truth) -> float:
    """min(0.3 n, 1), n being how many annotators gave this answer, all ten counted: ViCrop's
    rule for TextVQA, A-OKVQA and VQAv2. Of ten annotators, leaving each out once comes to the
    same number; what differs from `textvqa` is how texts are normalised."""
    return min(0.3 * _agreeing(answer, truth), 1.0)


def vicrop_within(answer: str, truth: Truth) -> float:
    """1 if the right answer is a part of the answer, letter by letter: ViCrop's rule for GQA.
    "no" is within "snow"."""
    return float(vqa_words(truth.answers[0]) in vqa_words(answer))


def vicrop_nearest(answer: str, truth: Truth) -> float:
    """1 if the right one of "yes" and "no" is more like the answer: ViCrop's rule for POPE."""
    nearest = max(("yes", "no"), key=lambda word: SequenceMatcher(None, answer, word).ratio())
    return float(nearest == _word(truth.answers[0]))


def _agreeing(answer: str, truth: Truth) -> int:
    said = vqa_words(answer)
    return sum(vqa_words(one) == said for one in truth.answers)


# --- figures of a split ---------------------------------------------------------------------


def yes_no_figures(
    answers: Sequence[str], truths: Sequence[Truth], *, stop: Sequence[str] = ()
) -> dict[str, float]:
    """POPE's figures, "yes" being the positive class; answers are cut at `stop`.

    `yes_ratio` is how often the model says yes. `pope_yes_ratio`, which lmms-eval reports, is
    how often yes is right, whatever the model says. An answer that is neither yes nor no counts
    against accuracy only.
    """
    said = [_word(_cut(answer, stop)) for answer in answers]
    right = [_word(truth.answers[0]) for truth in truths]
    pairs = list(zip(said, right, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = _share(hits, hits + pairs.count(("yes", "no")))
    recall = _share(hits, hits + pairs.count(("no", "yes")))
    return {
        "accuracy": _share(sum(one == other for one, other in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(said.count("yes"), len(said)),
        "pope_yes_ratio": _share(right.count("yes"), len(right)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def mean_by(
    key: str, scorer: Scorer, answers: Sequence[str], truths: Sequence[Truth]
) -> dict[str, float]:
    """Mean score by what the truths hold under `key`; truths without it are left out."""
    scores: Mapping[str, list[float]] = defaultdict(list)
    for answer, truth in zip(answers, truths, strict=True):
        if truth.extra.get(key):
            scores[str(truth.extra[key])].append(scorer(answer, truth))
    return {name: sum(found) / len(found) for name, found in sorted(scores.items())}
