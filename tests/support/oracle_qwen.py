"""Plain transformers as the oracle for Qwen2.5-VL, through its own chat template and processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from vlm_collab.geometry import Size


class PictureProcessor(Qwen2_5_VLProcessor):
    """transformers' processor without its video half, which would need torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@dataclass
class QwenOracle:
    """One checkpoint in float32 on the CPU, asked in its chat form at a fixed resolution.

    Attributes:
        processor: tokenizer and image processor.
        model: with transformers' default attention, for answers.
        eager: a second copy with eager attention, for attention weights.
        view: what every picture is resized to before the processor sees it.
        suffix: appended to every question.
    """

    processor: Any
    model: Any
    eager: Any
    view: Size
    suffix: str = ""

    @classmethod
    def of(cls, folder: Path, view: Size, suffix: str = "") -> QwenOracle:
        load = AutoModelForImageTextToText.from_pretrained
        return cls(
            PictureProcessor.from_pretrained(folder),
            load(folder, dtype=torch.float32).eval(),
            load(folder, dtype=torch.float32, attn_implementation="eager").eval(),
            view,
            suffix,
        )

    def inputs(self, question: str, *pictures: Image.Image) -> Any:
        fixed = [picture.resize(self.view, Image.Resampling.BICUBIC) for picture in pictures]
        content = [{"type": "image", "image": picture} for picture in fixed]
        content.append({"type": "text", "text": question + self.suffix})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )

    def answer(
        self, question: str, *pictures: Image.Image, max_new_tokens: int
    ) -> tuple[list[int], str, np.ndarray]:
        """Token ids, text, and raw logits `(tokens, vocabulary)`."""
        inputs = self.inputs(question, *pictures)
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # The checkpoint sets one, but answers are compared on the raw logits.
            repetition_penalty=1.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
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

    def positions(self, question: str, *pictures: Image.Image) -> torch.Tensor:
        """M-RoPE positions of a prompt, `(3, 1, length)`, from the model's own function."""
        inputs = self.inputs(question, *pictures)
        positions, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        return positions
