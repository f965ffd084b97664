"""Answers, uncertainty and attention of the demo model, computed with plain transformers.

This evaluation tool handles many questions at once: it recomputes prefixes and uses eager
attention. The engine computes the same quantities without either. Uncertainty and relative
attention are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349), Eq. 14-16 and Eq. 22.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from eval.analysis.statistics import auroc
from eval.demo_model.packing import PATCHES, vocabulary
from eval.demo_model.tower import to_pixels
from eval.demo_model.views import GRID
from eval.demo_model.words import EOS, GENERIC, IMAGE
from eval.signs.scenes import Box, SignQuestion
from server_plugin.backends.transformers.batch import cache_argument

_MAX_TOKENS = 5
_BATCH = 32


@dataclass(frozen=True, slots=True)
class ViewedQuestion:
    """A question with its 112-px global view, source size (w, h) and, optionally, a local view."""

    view: Image.Image
    question: SignQuestion
    size: tuple[int, int]
    local: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer. Per generated token, the end token included: ``min_entropy`` and ``entropy``
    in bits, ``margin`` as a probability. ``attention`` is (layers, 64): the last prompt position
    over the global view's tokens, mean over heads."""

    text: str
    min_entropy: NDArray[np.float64]
    entropy: NDArray[np.float64]
    margin: NDArray[np.float64]
    attention: NDArray[np.float64]


class Reader:
    """Runs the model on many prompts; float32, greedy."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.words = vocabulary()

    @torch.no_grad()
    def features(self, views: list[Image.Image]) -> Tensor:
        """Visual tokens (N, 64, width) of 112-px pictures."""
        pictures = np.stack([np.asarray(v.convert("RGB"), dtype=np.uint8) for v in views])
        parts = []
        for first in range(0, len(pictures), _BATCH):
            pixels = to_pixels(pictures[first : first + _BATCH], self.device)
            hidden = self.model.model.vision_tower(pixel_values=pixels).last_hidden_state
            parts.append(self.model.model.multi_modal_projector(hidden[:, 1:]))
        return torch.cat(parts)

    def read(
        self, features: Tensor, questions: list[str], local: Tensor | None = None
    ) -> list[Reading]:
        """Answer ``questions`` on global views (and local views: Song and Kim, Eq. 12)."""
        images = PATCHES * (1 if local is None else 2)
        prompts = [
            [*self.words.prefix(), *[IMAGE] * images, *self.words.suffix(q)] for q in questions
        ]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        readings: dict[int, Reading] = {}
        for _, group in groupby(order, key=lambda i: len(prompts[i])):
            same = list(group)
            for first in range(0, len(same), _BATCH):
                rows = same[first : first + _BATCH]
                visual = features[rows]
                if local is not None:
                    visual = torch.cat([visual, local[rows]], dim=1)
                answers = self._batch([prompts[i] for i in rows], visual)
                readings.update(zip(rows, answers, strict=True))
        return [readings[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]], visual: Tensor) -> list[Reading]:
        inner = self.model.model
        ids = torch.tensor(prompts, device=self.device)
        embeds = inner.language_model.embed_tokens(ids)
        slots = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(slots, visual.to(embeds.dtype))
        decoder: type = type(inner.language_model)
        cache_name = cache_argument(decoder)
        cache = DynamicCache(config=inner.language_model.config)
        before = inner.language_model.config._attn_implementation
        inner.language_model.set_attn_implementation("eager")
        try:
            out = inner.language_model(
                inputs_embeds=embeds, use_cache=True, output_attentions=True, **{cache_name: cache}
            )
        finally:
            inner.language_model.set_attn_implementation(before)
        start = len(self.words.prefix())
        rows = torch.stack(
            [a[:, :, -1, start : start + PATCHES].mean(1) for a in out.attentions], dim=1
        )
        chosen, measured = [], []
        for _ in range(_MAX_TOKENS):
            probabilities = self.model.lm_head(out.last_hidden_state[:, -1]).double().softmax(-1)
            two = probabilities.topk(2).values
            entropy = -(probabilities * probabilities.clamp_min(1e-300).log2()).sum(-1)
            measured.append(torch.stack([-two[:, 0].log2(), entropy, two[:, 0] - two[:, 1]], -1))
            chosen.append(probabilities.argmax(-1))
            out = inner.language_model(
                inputs_embeds=inner.language_model.embed_tokens(chosen[-1][:, None]),
                use_cache=True,
                **{cache_name: cache},
            )
        tokens = torch.stack(chosen, 1).cpu().numpy()
        values = torch.stack(measured, 1).cpu().numpy()
        maps = rows.double().cpu().numpy()
        readings = []
        for row in range(len(prompts)):
            ended = np.flatnonzero(tokens[row] == EOS)
            length = int(ended[0]) + 1 if len(ended) else _MAX_TOKENS
            kept = tokens[row][:length]
            text = str(self.words.tokenizer.decode(kept[kept != EOS].tolist()))
            low, entropy_bits, margin = values[row, :length].T
            readings.append(Reading(text, low, entropy_bits, margin, maps[row]))
        return readings


@dataclass(frozen=True, slots=True)
class Measured:
    """First answers, answers with the given local views, and maps of a set of questions.

    ``raw`` and ``relative`` are (N, layers, 64).
    """

    samples: list[ViewedQuestion]
    first: list[Reading]
    local: list[Reading]
    raw: NDArray[np.float64]
    relative: NDArray[np.float64]

    def first_right(self) -> NDArray[np.bool_]:
        """Which first answers are right."""
        return _right(self.first, self.samples)

    def located(self, maps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Per layer, how often the map's peak lies on a patch of the sign in question."""
        peaks = maps.argmax(-1)
        hits = np.zeros(peaks.shape)
        for row, sample in enumerate(self.samples):
            touched = touched_patches(sample.question.sign_box, sample.size)
            hits[row] = touched[peaks[row]]
        located: NDArray[np.float64] = hits.mean(0)
        return located

    def summary(self) -> dict[str, float]:
        """Figures for the learning curve."""
        right = self.first_right()
        unsure = np.array([reading.min_entropy.mean() for reading in self.first])
        figures = {"first": float(right.mean()), "auroc": auroc(unsure, ~right)}
        if self.local:
            figures["true_crop"] = float(_right(self.local, self.samples).mean())
        for name, maps in (("raw", self.raw), ("relative", self.relative)):
            for layer, share in enumerate(self.located(maps)):
                figures[f"{name}_{layer}"] = float(share)
        return figures


def touched_patches(box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Mask of the 64 patches of the global view that a source box touches."""
    columns, rows = np.arange(GRID) * size[0] / GRID, np.arange(GRID) * size[1] / GRID
    across = (columns + size[0] / GRID > box[0]) & (columns < box[2])
    down = (rows + size[1] / GRID > box[1]) & (rows < box[3])
    touched: NDArray[np.bool_] = np.outer(down, across).ravel()
    return touched


def _right(readings: list[Reading], samples: list[ViewedQuestion]) -> NDArray[np.bool_]:
    return np.array([r.text == s.question.answer for r, s in zip(readings, samples, strict=True)])


def measure(
    model: LlavaForConditionalGeneration, samples: list[ViewedQuestion], epsilon: float = 0.0
) -> Measured:
    """Run the first and the generic pass, and the second one if all samples have local views."""
    reader = Reader(model)
    features = reader.features([s.view for s in samples])
    texts = [s.question.text for s in samples]
    first = reader.read(features, texts)
    generic = reader.read(features, [GENERIC] * len(samples))
    local: list[Reading] = []
    pictures = [s.local for s in samples if s.local is not None]
    if len(pictures) == len(samples):
        local = reader.read(features, texts, reader.features(pictures))
    raw = np.stack([r.attention for r in first])
    relative = raw / (np.stack([r.attention for r in generic]) + epsilon)
    return Measured(samples, first, local, raw, relative)
