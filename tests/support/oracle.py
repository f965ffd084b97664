"""Plain transformers as the oracle: used as by any user, without code of this project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from server_plugin.backends.base import Generation
from vlm_collab.geometry import Size
from vlm_collab.method.policy import Aggregate, Metric, aggregate


@dataclass
class Oracle:
    """One checkpoint in float32 on the CPU, asked with the chat form of LLaVA.

    Attributes:
        processor: tokenizer and image processor.
        model: with transformers' default attention, for answers.
        eager: a second copy with eager attention, for attention weights.
    """

    processor: Any
    model: Any
    eager: Any

    @classmethod
    def of(cls, folder: Path) -> Oracle:
        load = AutoModelForImageTextToText.from_pretrained
        return cls(
            AutoProcessor.from_pretrained(folder),
            load(folder, dtype=torch.float32).eval(),
            load(folder, dtype=torch.float32, attn_implementation="eager").eval(),
        )

    def inputs(self, question: str, *pictures: Image.Image) -> Any:
        text = f"USER: {'<image>' * len(pictures)}\n{question} ASSISTANT:"
        return self.processor(text=text, images=list(pictures), return_tensors="pt")

    def answer(
        self, question: str, *pictures: Image.Image, max_new_tokens: int
    ) -> tuple[list[int], str, np.ndarray]:
        """Token ids, text, and raw logits `(tokens, vocabulary)`."""
        inputs = self.inputs(question, *pictures)
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.decode(ids, skip_special_tokens=True).strip()
        return ids, text, torch.cat(output.logits).double().numpy()

    def row(self, question: str, view: Image.Image, layer: int) -> np.ndarray:
        """Attention of the last prompt position to the visual tokens, mean over heads."""
        inputs = self.inputs(question, view)
        with torch.inference_mode():
            weights = self.eager(**inputs, output_attentions=True).attentions[layer]
        on_image = inputs["input_ids"][0] == self.model.config.image_token_id
        return weights[0, :, -1].mean(dim=0)[on_image].double().numpy()


def uncertainties(logits: np.ndarray) -> np.ndarray:
    """Min-entropy, Shannon entropy (bits) and margin of each row, from Song and Kim, Eq. 14-16.

    The paper: *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
    2512.16349).
    """
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    top = -np.sort(-p, axis=1)
    entropy = -(p * np.log2(np.maximum(p, 1e-300))).sum(axis=1)
    return np.stack([-np.log2(top[:, 0]), entropy, top[:, 0] - top[:, 1]], axis=1)


def compare_answer(got: Generation, expected: tuple[list[int], str, np.ndarray]) -> None:
    """Compare an answer with the oracle's: tokens, text, and uncertainty by every metric, for each
    token and with every aggregation."""
    ids, text, logits = expected
    assert list(got.token_ids) == ids
    assert got.text == text
    reference = uncertainties(logits)
    np.testing.assert_allclose(np.array(got.steps), reference, rtol=0, atol=1e-5)
    for column, metric in enumerate((Metric.MIN_ENTROPY, Metric.ENTROPY, Metric.MARGIN)):
        for how, count in ((Aggregate.FULL, None), (Aggregate.FIRST_K, 5), (Aggregate.FIRST, 1)):
            mean = reference[:count, column].mean()
            assert abs(aggregate(got.steps, metric, how, k=5) - mean) <= 1e-5


def picture(seed: int, size: Size) -> Image.Image:
    """Random blocks, so that every patch differs from its neighbours."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return blocks.resize(size, Image.Resampling.BICUBIC)
