"""Packed sequences for decoder training: one scene, its global view once, many questions.

A packed sequence is a tree. Its trunk is the common start of every prompt about a picture:
``<s>USER: `` and the global view's 64 visual tokens. Each branch continues the trunk with its own
text, or with a local view's visual tokens and then its text (Song and Kim, *Collaborative
Edge-to-Server Inference for Vision-Language Models*, 2025, arXiv 2512.16349, Eq. 12). A token
attends to the trunk and to earlier tokens of its own branch, and its position counts from the
trunk's end, so each branch computes the same as it would alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eval.demo_model.views import (
    GRID,
    IGNORE,
    draw_view,
    full_window,
    random_size,
    random_window,
    view_style,
)
from eval.demo_model.words import (
    GENERIC,
    IMAGE,
    LIST_SIGNS,
    PAD,
    Vocabulary,
    easy_question,
    sign_list,
)
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import Scene, SignQuestion

PATCHES = GRID * GRID
LOCAL_VIEWS = 2
_VIEW_QUESTIONS = 4
_ELSEWHERE = 0.08  # share of local views of a random place, not of the sign in question
_LIST_WEIGHT = 0.4
_GENERIC_WEIGHT = 0.3


@functools.cache
def vocabulary() -> Vocabulary:
    """The vocabulary, built once per process."""
    return Vocabulary()


@dataclass(slots=True)
class _Tree:
    """A packed sequence under construction."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    trunk: int = 0
    branches: int = 0

    def start(self, ids: list[int]) -> None:
        self.ids, self.trunk = list(ids), len(ids)
        self.positions = list(range(len(ids)))
        self.branch = [0] * len(ids)
        self.labels = [IGNORE] * len(ids)
        self.weights = [0.0] * len(ids)

    def grow(self, prompt: list[int], answer: list[int], weight: float) -> None:
        """Add a branch; the prompt's last token already predicts the answer's first."""
        self.branches += 1
        ids = prompt + answer[:-1]
        self.ids += ids
        self.positions += range(self.trunk, self.trunk + len(ids))
        self.branch += [self.branches] * len(ids)
        self.labels += [IGNORE] * (len(prompt) - 1) + answer
        self.weights += [0.0] * (len(prompt) - 1) + [weight] * len(answer)


@dataclass(frozen=True, slots=True)
class DecoderBatch:
    """``views`` is uint8 (B, 3, 112, 112, 3): a global and two local views; the rest is (B, L).

    ``labels`` holds the token that each position predicts, ``branch`` is 0 for the trunk and -1
    for padding, ``weights`` is the weight of each label in the loss.
    """

    views: NDArray[np.uint8]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    branch: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]


def _question_for_crop(rng: np.random.Generator, choices: tuple[SignQuestion, ...]) -> SignQuestion:
    """Choose a question for a local view; half of the time one of the two smallest texts."""
    if rng.random() < 0.5:
        smallest = sorted(choices, key=lambda q: q.view_text_height_px)[:2]
        return smallest[int(rng.integers(len(smallest)))]
    return choices[int(rng.integers(len(choices)))]


def _pack(scene: Scene, rng: np.random.Generator) -> tuple[_Tree, list[NDArray[np.uint8]]]:
    words = vocabulary()
    choices = questions(scene)
    views = [draw_view(scene, full_window(scene), rng)]
    tree = _Tree()
    tree.start([*words.prefix(), *[IMAGE] * PATCHES])
    for number in rng.permutation(len(choices))[:_VIEW_QUESTIONS].tolist():
        question = choices[number]
        tree.grow(words.suffix(question.text), words.answer(question.answer), 1.0)
    for _ in range(LOCAL_VIEWS):
        question = _question_for_crop(rng, choices)
        around = None if rng.random() < _ELSEWHERE else question.sign
        views.append(draw_view(scene, random_window(rng, scene, around), rng))
        prompt = [IMAGE] * PATCHES + words.suffix(question.text)
        tree.grow(prompt, words.answer(question.answer), 1.0)
    text, answer = easy_question(scene, rng)
    tree.grow(words.suffix(text), words.answer(answer), 1.0)
    description = words.answer(scene.background.description)
    tree.grow(words.suffix(GENERIC), description, _GENERIC_WEIGHT)
    tree.grow(words.suffix(LIST_SIGNS), words.answer(sign_list(scene)), _LIST_WEIGHT)
    return tree, views


def decoder_batch(
    seed: int,
    step: int,
    count: int,
    two_digits: float,
    ease: float,
    power: float = 1.0,
    jitter: float = 0.0,
) -> DecoderBatch:
    """Make batch ``step`` of decoder training; the same arguments give the same batch."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, 2]))
    trees, views = [], []
    for place in range(count):
        index = (seed * 100_003 + step) * count + place
        style = view_style(two_digits, ease, power, jitter)
        scene = generate_scene("train", index, size=random_size(rng), style=style)
        tree, pictures = _pack(scene, rng)
        trees.append(tree)
        views.append(np.stack(pictures))
    longest = max(len(tree.ids) for tree in trees)
    batch = DecoderBatch(
        views=np.stack(views),
        ids=np.full((count, longest), PAD),
        positions=np.zeros((count, longest), np.int64),
        branch=np.full((count, longest), -1),
        labels=np.full((count, longest), IGNORE),
        weights=np.zeros((count, longest), np.float32),
    )
    for row, tree in enumerate(trees):
        used = len(tree.ids)
        batch.ids[row, :used] = tree.ids
        batch.positions[row, :used] = tree.positions
        batch.branch[row, :used] = tree.branch
        batch.labels[row, :used] = tree.labels
        batch.weights[row, :used] = tree.weights
    return batch


def tree_mask(branch: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Attention mask, (B, 1, L, L), for a (B, L) array of branches."""
    same = branch[:, :, None] == branch[:, None, :]
    trunk = (branch == 0)[:, None, :]
    earlier = np.tril(np.ones((branch.shape[1], branch.shape[1]), bool))
    mask: NDArray[np.bool_] = ((same | trunk) & earlier)[:, None]
    return mask
