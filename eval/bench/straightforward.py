"""A straightforward pipeline on transformers, which the engine is compared with.

It implements Algorithm 1 of Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models* (2025, arXiv 2512.16349). Each step is a separate call that starts anew:

1. `generate` on the global view gives the first answer, and its logits the uncertainty;
2. a forward with `output_attentions=True` gives the attention under the question,
3. another forward gives the attention under the generic instruction; their ratio is the map, and
   the region search finds the box;
4. `generate` on both views gives the second answer.

The comparison is fair: the pipeline uses one copy of the weights in the same precision on the same
device, `inference_mode`, fused attention in `generate` (only the forwards that return attention
weights are eager, as transformers requires). Those forwards use no cache and compute one row of
logits. Region search, cropping and statistics are the engine's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from server_plugin.backends.base import ModelInfo
from server_plugin.models.presets import IMAGE_SLOT, QUESTION_SLOT, Preset
from vlm_collab.geometry import Box, Size, frame_of, token_box_to_source
from vlm_collab.method.roi import place_region, relative_map
from vlm_collab.method.uncertainty import TokenStatistics, batch_token_statistics


@dataclass(frozen=True, slots=True)
class StraightforwardAnswer:
    """Result of one retransmitted question.

    Attributes:
        first, second: token ids of the two answers.
        box: the region, in px of the source.
        steps: statistics of the first answer's tokens.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    box: Box
    steps: tuple[TokenStatistics, ...]


class Straightforward:
    """The pipeline on one LLaVA model.

    Args:
        model: a `LlavaForConditionalGeneration`; not changed, and its weights are not copied.
        processor: the checkpoint's processor.
        preset: prompt, generic instruction, layer and region search.
        info: grid and sizes of the model.
    """

    def __init__(self, model: Any, processor: Any, preset: Preset, info: ModelInfo) -> None:
        self._fused = _with_attention(model, "sdpa")
        self._eager = _with_attention(model, "eager")
        self._processor = processor
        self._preset = preset
        self._info = info

    @torch.inference_mode()
    def answer(
        self,
        view: Image,
        source: Size,
        question: str,
        crop: Callable[[Box], Image],
        *,
        max_new_tokens: int,
    ) -> StraightforwardAnswer:
        """Run both passes, whatever the uncertainty.

        Args:
            view: the global view.
            source: size of the original, in px.
            question: the user's text.
            crop: function that returns the local view of a box.
            max_new_tokens: longest answer.
        """
        preset, info = self._preset, self._info
        first, steps = self._generate(question, [view], max_new_tokens)
        row = self._row(question, view)
        generic = self._row(preset.generic_instruction, view)
        heat = relative_map(row, generic, info.grid, epsilon=preset.epsilon)
        frame = frame_of(source, info.fit, info.view)
        window = place_region(heat, frame, info.base_px, preset.ratios, preset.placement)
        box = token_box_to_source(window, info.grid, frame, source)
        second, _ = self._generate(question, [view, crop(box)], max_new_tokens)
        return StraightforwardAnswer(first, second, box, steps)

    def _inputs(self, question: str, pictures: Sequence[Image]) -> Any:
        text = self._preset.template.replace(IMAGE_SLOT, IMAGE_SLOT * len(pictures))
        text = text.replace(QUESTION_SLOT, question)
        inputs = self._processor(text=text, images=list(pictures), return_tensors="pt")
        return inputs.to(self._fused.device, self._fused.dtype)

    def _generate(
        self, question: str, pictures: Sequence[Image], max_new_tokens: int
    ) -> tuple[tuple[int, ...], tuple[TokenStatistics, ...]]:
        inputs = self._inputs(question, pictures)
        output = self._fused.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits = torch.cat(output.logits).float().cpu().numpy()
        return tuple(ids), tuple(batch_token_statistics(logits))

    def _row(self, question: str, view: Image) -> Any:
        """Attention of the last prompt position to the visual tokens, `(visual_tokens,)`."""
        inputs = self._inputs(question, [view])
        output = self._eager(**inputs, output_attentions=True, use_cache=False, logits_to_keep=1)
        weights: Tensor = output.attentions[self._preset.layer]  # (1, heads, n, n)
        on_image = inputs["input_ids"][0] == self._fused.config.image_token_id
        return weights[0, :, -1].float().mean(dim=0)[on_image].cpu().numpy()


def _with_attention(model: Any, name: str) -> Any:
    """Copy a model with another kind of attention; the copy shares the weights."""
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation(name)
    return twin
