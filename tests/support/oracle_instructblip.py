"""Plain transformers as the oracle for InstructBLIP, without code of this project.

Answers come from the library's own `generate`, attention from a second copy of the model with
eager attention. The library has no InstructBLIP of two pictures; for that the Q-Former is called
by hand for each, and the language model's own `generate` continues from the joined query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor


@dataclass
class InstructBlipOracle:
    """One checkpoint in float32 on the CPU.

    Attributes:
        processor: tokenizers and image processor.
        model: with transformers' default attention, for answers.
        eager: a second copy with eager attention, for attention weights.
        template: the prompt, with `{}` for the question.
    """

    processor: Any
    model: Any
    eager: Any
    template: str = "{}"

    @classmethod
    def of(cls, folder: Path, template: str = "{}") -> InstructBlipOracle:
        load = InstructBlipForConditionalGeneration.from_pretrained
        return cls(
            InstructBlipProcessor.from_pretrained(folder),
            load(folder, dtype=torch.float32).eval(),
            load(folder, dtype=torch.float32, attn_implementation="eager").eval(),
            template,
        )

    def inputs(self, question: str, picture: Image.Image) -> Any:
        text = self.template.format(question)
        return self.processor(images=picture, text=text, return_tensors="pt")

    def answer(
        self, question: str, picture: Image.Image, *, max_new_tokens: int, **options: Any
    ) -> tuple[list[int], str, np.ndarray]:
        """Token ids, text, and raw logits `(tokens, vocabulary)` of the library's `generate`."""
        inputs = self.inputs(question, picture)
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return self._result(output, inputs["input_ids"].shape[1])

    def answer_by_hand(
        self, question: str, *pictures: Image.Image, max_new_tokens: int
    ) -> tuple[list[int], str, np.ndarray]:
        """The same, from the query tokens of any number of pictures, one after the other."""
        text_ids = self.processor.tokenizer(self.template.format(question), return_tensors="pt")
        with torch.inference_mode():
            parts = [self.query_tokens(question, picture) for picture in pictures]
            parts.append(self.model.get_input_embeddings()(text_ids["input_ids"])[0])
            embeddings = torch.cat(parts)[None]
            output = self.model.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
                max_new_tokens=max_new_tokens, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return self._result(output, 0)

    def query_tokens(self, question: str, picture: Image.Image) -> torch.Tensor:
        """The language model's input for a picture, `(query tokens, hidden)`."""
        inputs, model = self.inputs(question, picture), self.model
        seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
        count = model.config.num_query_tokens
        mask = torch.cat([torch.ones(1, count), inputs["qformer_attention_mask"]], dim=1)
        outputs = model.qformer(
            input_ids=inputs["qformer_input_ids"],
            attention_mask=mask.long(),
            query_embeds=model.query_tokens,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        )
        return model.language_projection(outputs[0][:, :count])[0]

    def cell_attention(self, question: str, picture: Image.Image, layer: int) -> np.ndarray:
        """A cross-attention layer's attention, mean over heads, `(query tokens, patches)`."""
        inputs = self.inputs(question, picture)
        with torch.inference_mode():
            outputs = self.eager.get_image_features(
                pixel_values=inputs["pixel_values"],
                qformer_input_ids=inputs["qformer_input_ids"],
                qformer_attention_mask=inputs["qformer_attention_mask"],
                output_attentions=True,
            )
        weights = outputs.qformer_outputs.cross_attentions[layer]
        return weights[0, :, :, 1:].mean(dim=0).double().numpy()

    def row(self, question: str, picture: Image.Image, layer: int) -> np.ndarray:
        """Attention of the last prompt position to the query tokens, mean over heads."""
        inputs = self.inputs(question, picture)
        with torch.inference_mode():
            outputs = self.eager(**inputs, output_attentions=True).language_model_outputs
        on_picture = inputs["input_ids"][0] == self.eager.config.image_token_id
        return outputs.attentions[layer][0, :, -1].mean(dim=0)[on_picture].double().numpy()

    def patches(
        self, question: str, picture: Image.Image, layer: int, qformer_layer: int
    ) -> np.ndarray:
        """Attention that reaches each patch through the query tokens, `(patches,)`."""
        row = self.row(question, picture, layer)
        return row @ self.cell_attention(question, picture, qformer_layer)

    def _result(self, output: Any, start: int) -> tuple[list[int], str, np.ndarray]:
        ids = output.sequences[0, start:].tolist()
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return ids, text, torch.cat(output.logits).double().numpy()
