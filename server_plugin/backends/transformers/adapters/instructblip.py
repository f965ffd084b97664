"""Adapter for InstructBLIP with a Vicuna decoder: ViT, Q-Former, Llama decoder.

Covers `Salesforce/instructblip-vicuna-*`. The Q-Former turns a picture's patches into a few query
tokens while it reads the question, so a picture's visual tokens depend on the question. They stand
before everything else in the decoder's prompt, even before its first special token. A second
picture's query tokens, computed under the same question, follow directly after the first's.

Concurrency: an adapter keeps no state of a question between calls. The capture is an argument of
the Q-Former's forward, so forward passes may run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.transformers.adapters.base import (
    Adapter,
    Layout,
    VisualTokens,
    square_cells,
)
from server_plugin.backends.transformers.adapters.prompts import Prompt, PromptBuilder
from server_plugin.backends.transformers.adapters.tokens import PlainText, Tokenizer
from server_plugin.models.presets import IMAGE_SLOT, QUESTION_SLOT, Preset
from vlm_collab.errors import ConfigError, ModelError, QuestionError
from vlm_collab.geometry import Fit, Grid, Size
from vlm_collab.protocol.image_positions import Place

ATTENTION_NAME: Final = "vlm_collab_qformer_sdpa"
"""Name of the Q-Former's attention function in transformers' registries."""

_CAPTURE_ARGUMENT: Final = "cross_capture"


class InstructBlipAdapter(Adapter):
    """An `InstructBlipForConditionalGeneration` checkpoint with a Llama decoder.

    Raises:
        ModelError: the language model is not a Llama, tokenizer or image processor do not belong to
            the model, the Q-Former's tokenizer is missing, or the vision tower has no square
            patches.
        ConfigError: the preset's Q-Former layer does not exist, or its template does not begin
            with the picture.
    """

    family = "instructblip"
    model_types = ("instructblip",)
    reads_question = True

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        super().__init__(model, processor, preset)
        # In half precision, transformers keeps the query tokens in float32, and `model.dtype` is
        # that of the first parameter.
        self.dtype = model.language_model.dtype
        _check_picture_size(processor.image_processor, self.layout.view)
        self._prompts = _prompts(model.config, processor, preset, self.layout)
        self._cross_attention = _cross_attention(model.qformer, preset.qformer_layer)
        _use_capturing_attention(model.qformer)

    @classmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        decoder = config.text_config.model_type
        if decoder != "llama":
            raise ModelError(
                "InstructBLIP is supported with a Llama decoder (Vicuna); this checkpoint's is "
                f"{decoder!r}"
            )
        side, cells = square_cells(config.vision_config, preset)
        return Layout(
            view=Size(side, side),
            grid=Grid(rows=cells, columns=cells),
            visual_tokens=config.num_query_tokens,
            context_tokens=config.text_config.max_position_embeddings,
            # The vision tower's output, class token included; it does not depend on the question.
            encoded_numbers=(1 + cells * cells) * config.vision_config.hidden_size,
        )

    @property
    def decoder(self) -> Any:
        return self.model.language_model.model

    @property
    def output_head(self) -> Any:
        return self.model.language_model.lm_head

    @property
    def prompts(self) -> InstructBlipPrompts:
        return self._prompts

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer.

        These are the inner language model's, which `generate` uses, and the tokenizer's end token:
        the hub's files name another token (`<s>`) for the former, and text after `</s>` is not
        part of the answer.
        """
        end = self.model.language_model.generation_config.eos_token_id
        ids = [] if end is None else [end] if isinstance(end, int) else end
        own = self.processor.tokenizer.eos_token_id
        return frozenset(ids) if own is None else frozenset([*ids, own])

    def encode(self, pictures: Sequence[Image]) -> list[Tensor]:
        """Return the vision tower's last hidden states, class token first.

        Returns:
            For each picture, `(1 + cells, width)`.
        """
        pixels: Tensor = self.processor.image_processor(
            images=[self.fitted(picture) for picture in pictures], return_tensors="pt"
        )["pixel_values"]
        features = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype))
        return list(features.last_hidden_state)

    def visual_tokens(self, encoded: Tensor, question: str) -> VisualTokens:
        """Return a picture's query tokens under a question, and their attention to its patches.

        `cell_attention` is that of one cross-attention layer of the Q-Former (softmax over
        class token and patches, mean over heads, class token dropped), float32.
        """
        ids = torch.tensor([self._prompts.qformer_ids(question)], device=self.device)
        capture = _CrossCapture(self._cross_attention)
        hidden = self.model.qformer(
            input_ids=ids,
            query_embeds=self.model.query_tokens,
            encoder_hidden_states=encoded[None],
            **{_CAPTURE_ARGUMENT: capture},
        ).last_hidden_state
        # After the query tokens come the text's tokens, which the decoder does not use.
        queries = hidden[0, : self.layout.visual_tokens]
        return VisualTokens(self.model.language_projection(queries), capture.take()[:, 1:])

    def fitted(self, picture: Image) -> Image:
        """Crop or pad a picture to the view's shape; the processor itself stretches."""
        view = self.layout.view
        if picture.size == view or self.preset.fit is Fit.STRETCH:
            return picture
        if self.preset.fit is Fit.CROP:
            return ImageOps.fit(picture, view, PillowImage.Resampling.BICUBIC)
        mean = self.processor.image_processor.image_mean
        colour = tuple(round(channel * 255) for channel in mean)
        return ImageOps.pad(picture, view, PillowImage.Resampling.BICUBIC, color=colour)


class InstructBlipPrompts(PromptBuilder):
    """Builds prompts for decoder and Q-Former from one text.

    In a conversation, the Q-Former reads the current question, the decoder reads everything.
    Places of pictures are ignored: query tokens stand before all text, once for each picture.

    The decoder's prompt begins with the image tokens. Then comes the tokenised text, with its first
    special token. The Q-Former's prompt is the text alone, from its own tokenizer. This is what the
    checkpoint's own processor does.

    Args:
        tokenizer: the decoder's.
        qformer_tokenizer: the Q-Former's.
        template: `<image>` first, then one `{question}`.
        image_token: the checkpoint's text for a visual token.
        image_token_id: its id.
        visual_tokens: tokens of one picture.
        context_tokens: longest sequence that the decoder takes, answer included.
        qformer_tokens: longest text that the Q-Former takes.

    Raises:
        ConfigError: the template has something before the picture.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        qformer_tokenizer: Tokenizer,
        template: str,
        *,
        image_token: str,
        image_token_id: int,
        visual_tokens: int,
        context_tokens: int,
        qformer_tokens: int,
        turn: str | None = None,
    ) -> None:
        if not template.startswith(IMAGE_SLOT):
            raise ConfigError(
                f"prompts of this family begin with {IMAGE_SLOT}: the query tokens stand before "
                f"all text (the prompt in use is {template!r})"
            )
        super().__init__(
            tokenizer,
            template,
            image_token=image_token,
            image_token_id=image_token_id,
            visual_tokens=visual_tokens,
            context_tokens=context_tokens,
            turn=turn,
        )
        self._qformer_plain = plain = PlainText(qformer_tokenizer)
        around_question = template.removeprefix(IMAGE_SLOT).split(QUESTION_SLOT)
        self._qformer_before, self._qformer_after = map(plain.template, around_question)
        self._qformer_tokens = qformer_tokens
        added = qformer_tokenizer.added_tokens_decoder
        self._qformer_reserved_ids = set(added) - {qformer_tokenizer.unk_token_id}
        self._qformer_own_reserved = self._count_qformer_reserved(self.qformer_ids("?"))

    def check(self, request: GenerationRequest, images: int) -> None:
        """Refuse a question for which no prompt can be built.

        Raises:
            QuestionError: as in `PromptBuilder.check`, or the question is too long for the
                Q-Former.
        """
        super().check(replace(request, places=()), images)
        if not images:
            return  # the Q-Former is not used
        ids = self.qformer_ids(request.question)
        if self._count_qformer_reserved(ids) != self._qformer_own_reserved:
            raise QuestionError("the question spells a token that this model reserves")
        self._check_qformer_length(ids)

    def build(
        self, request: GenerationRequest, images: int, views: int = 1, *, picture: int = 0
    ) -> Prompt:
        """Build the prompt of a checked question, with all pictures in front.

        Raises:
            QuestionError: there is no room for an answer of `max_new_tokens` tokens, or the
                question is too long for the Q-Former.
        """
        if images:
            self._check_qformer_length(self.qformer_ids(request.question))
        return super().build(replace(request, places=()), images, views)

    def qformer_ids(self, question: str) -> list[int]:
        """Return the token ids that the Q-Former reads for a question."""
        return self._qformer_plain.encode(f"{self._qformer_before}{question}{self._qformer_after}")

    def _encode(self, request: GenerationRequest, places: Sequence[Place]) -> list[int]:
        pictures = [self._image_token_id] * len(places)
        return pictures + self._plain.encode(self._conversation(request, places))

    def _check_qformer_length(self, ids: list[int]) -> None:
        if len(ids) > self._qformer_tokens:
            raise QuestionError(
                f"the question is too long: {len(ids)} tokens exceed the {self._qformer_tokens} "
                "that this model's Q-Former reads"
            )

    def _count_qformer_reserved(self, ids: list[int]) -> int:
        return sum(token in self._qformer_reserved_ids for token in ids)


class _CrossCapture:
    """Captures one cross-attention layer's weights in one forward of the Q-Former. Used once.

    Args:
        layer: the attention module.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._weights: Tensor | None = None

    def keep(self, layer: torch.nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Keep the weights if this is the requested layer.

        Args:
            layer: the module that runs now.
            query: `(1, heads, queries, width)`.
            key: `(1, heads, keys, width)`.
            scaling: factor on the products.
        """
        if layer is self._layer:
            # A few query tokens times a few hundred patches: cheap compared with the layer.
            scores = query[0].float() @ key[0].float().transpose(1, 2) * scaling
            self._weights = torch.softmax(scores, dim=-1).mean(dim=0)

    def take(self) -> Tensor:
        """Return the weights, mean over heads, float32, shape `(queries, keys)`.

        Raises:
            RuntimeError: nothing was captured: the installed transformers does not pass keyword
                arguments down to attention.
        """
        if self._weights is None:
            import transformers

            raise RuntimeError(
                f"the Q-Former's attention was not captured (transformers "
                f"{transformers.__version__})"
            )
        return self._weights


def _capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cross_capture: _CrossCapture | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention function of the Q-Former: stock SDPA, plus the capture of one layer's weights."""
    if cross_capture is not None:
        cross_capture.keep(module, query, key, scaling)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **rest
    )
    return output


def _use_capturing_attention(qformer: Any) -> None:
    """Make one Q-Former use `_capturing_attention`. Other models are not affected."""
    AttentionInterface.register(ATTENTION_NAME, _capturing_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    qformer.set_attn_implementation(ATTENTION_NAME)


def _cross_attention(qformer: Any, index: int) -> torch.nn.Module:
    """Return the attention module of a cross-attention layer, counted among those layers."""
    found = [layer for layer in qformer.encoder.layer if layer.has_cross_attention]
    if index >= len(found):
        raise ConfigError(
            f"qformer_layer {index} does not exist: the Q-Former has cross-attention layers 0 to "
            f"{len(found) - 1}"
        )
    module: torch.nn.Module = found[index].crossattention.attention
    return module


def _prompts(config: Any, processor: Any, preset: Preset, layout: Layout) -> InstructBlipPrompts:
    tokenizer, image_token = processor.tokenizer, str(processor.image_token)
    qformer_tokenizer = getattr(processor, "qformer_tokenizer", None)
    # If the folder is missing, transformers loads the decoder's tokenizer a second time.
    if qformer_tokenizer is None or qformer_tokenizer.get_vocab() == tokenizer.get_vocab():
        raise ModelError("the checkpoint has no tokenizer for its Q-Former (qformer_tokenizer/)")
    image_token_id: int | None = config.image_token_id
    if tokenizer.encode(image_token, add_special_tokens=False) != [image_token_id]:
        raise ModelError(
            f"the checkpoint's tokenizer has no image token {image_token!r} with id "
            f"{image_token_id}; tokenizer and weights do not belong together"
        )
    for which, vocabulary, tokens in (
        ("language model", config.text_config.vocab_size, tokenizer),
        ("Q-Former", config.qformer_config.vocab_size, qformer_tokenizer),
    ):
        # Added tokens may lie beyond the embeddings: no question can contain one.
        if tokens.vocab_size > vocabulary:
            raise ModelError(
                f"the tokenizer of the {which} has {tokens.vocab_size} tokens, the model "
                f"{vocabulary}; tokenizer and weights do not belong together"
            )
    return InstructBlipPrompts(
        tokenizer,
        qformer_tokenizer,
        preset.template,
        image_token=image_token,
        image_token_id=config.image_token_id,
        visual_tokens=layout.visual_tokens,
        context_tokens=layout.context_tokens,
        turn=preset.turn,
        qformer_tokens=config.qformer_config.max_position_embeddings,
    )


def _check_picture_size(image_processor: Any, view: Size) -> None:
    size = image_processor.size
    if (size.get("width"), size.get("height")) != view:
        raise ModelError(
            f"the image processor makes pictures of {dict(size)}, but the vision tower takes "
            f"{view.width} x {view.height} px"
        )
