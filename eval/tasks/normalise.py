"""The answer normalisation of the VQA evaluation, as lmms-eval 0.7.3 applies it.

It unifies case, punctuation, articles, number words and contractions, so that "The two-way." and
"2 way" are the same answer. Its oddities are kept, because published scores include them: whether
punctuation becomes a blank or nothing depends on the whole text, and only the first 32 periods are
removed.
`tests/eval/test_tasks_lmms_eval.py` checks it against lmms-eval.
"""

from __future__ import annotations

import re

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
# Meant as "not a decimal point", but the original checks only the next character.
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes the flag re.UNICODE (32) to `re.sub` as the count.
_MOST_PERIODS = 32

_CONTRACTIONS_IN_USE = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# A contraction that lacks an apostrophe gets it back.
_CONTRACTIONS = {
    lacking: word
    for word in _CONTRACTIONS_IN_USE.split()
    for lacking in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}  # reversed in the original's table too


def vqa_words(text: str) -> str:
    """Normalise a text as VQAv2, A-OKVQA and ViCrop do.

    ViCrop's own script differs for "1,,2", with two commas.
    """
    return _words(_punctuation(text))


def textvqa_words(text: str) -> str:
    """Normalise a text as TextVQA does: it first handles commas, question marks and "'s"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_punctuation(text))


def _punctuation(text: str) -> str:
    grouped = _GROUPED_DIGITS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if grouped or beside_blank else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
