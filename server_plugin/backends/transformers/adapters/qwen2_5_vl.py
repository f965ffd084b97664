"""Adapter for Qwen2.5-VL: vision tower with window attention, Qwen2 decoder with M-RoPE.

Covers `Qwen/Qwen2.5-VL-*`. The model takes pictures of any size. Here every picture, global or
local view, is resized to one square, so that all views have the same grid. Its side is 224 px by
default, as in Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models*
(2025, arXiv 2512.16349). A token represents a square of merged patches (28 px). Each picture stands
between its own start and end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from PIL import Image as PillowImage
from PIL.Image import Image
from torch import Tensor

from server_plugin.backends.transformers.adapters.base import Adapter, Layout
from server_plugin.backends.transformers.adapters.prompts import Prompt, PromptBuilder
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError, ModelError
from vlm_collab.geometry import Grid, Size

DEFAULT_VIEW_PX: Final = 224

_IMAGE_TOKEN: Final = "<|image_pad|>"
_AROUND_PICTURE: Final = ("<|vision_start|>", "<|vision_end|>")


class Qwen25VLAdapter(Adapter):
    """A `Qwen2_5_VLForConditionalGeneration` checkpoint.

    Raises:
        ModelError: tokenizer or image processor do not belong to the model.
        ConfigError: the preset's `view_px` is not a multiple of a token's side, or the context has
            no room for two pictures of that size.
    """

    family = "qwen2.5-vl"
    model_types = ("qwen2_5_vl",)

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        super().__init__(model, processor, preset)
        config = model.config
        _check_parts(processor, config)
        # Positions of a picture's tokens relative to its first one, (3, visual_tokens): time, row
        # and column. Time is 0 throughout.
        cells = torch.arange(self.layout.visual_tokens, device=self.device)
        columns = self.layout.grid.columns
        self._cells = torch.stack([torch.zeros_like(cells), cells // columns, cells % columns])
        self._prompts = PromptBuilder(
            processor.tokenizer,
            preset.template,
            image_token=_IMAGE_TOKEN,
            image_token_id=config.image_token_id,
            visual_tokens=self.layout.visual_tokens,
            context_tokens=self.layout.context_tokens,
            around_picture=_AROUND_PICTURE,
            turn=preset.turn,
        )

    @classmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        vision, context = config.vision_config, config.text_config.max_position_embeddings
        token_px = vision.patch_size * vision.spatial_merge_size
        side = preset.view_px or DEFAULT_VIEW_PX
        if side % token_px:
            raise ConfigError(
                f"view_px {side} is not a multiple of {token_px}, the side in px of one visual "
                f"token; the nearest multiple is {max(round(side / token_px), 1) * token_px}"
            )
        cells = side // token_px
        # Two pictures and their start and end tokens; the prompt builder counts the text.
        if 2 * (cells * cells + 2) > context:
            raise ConfigError(
                f"view_px {side} gives {cells * cells} tokens for each picture, but the model's "
                f"context of {context} tokens has no room for two pictures; choose a smaller view"
            )
        return Layout(
            view=Size(side, side),
            grid=Grid(rows=cells, columns=cells),
            visual_tokens=cells * cells,
            context_tokens=context,
        )

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def output_head(self) -> Any:
        return self.model.lm_head

    @property
    def prompts(self) -> PromptBuilder:
        return self._prompts

    def encode(self, pictures: Sequence[Image]) -> list[Tensor]:
        inputs = self.processor.image_processor(
            images=[self.fitted(picture) for picture in pictures],
            # Otherwise the processor would choose a size for each picture.
            do_resize=False,
            return_tensors="pt",
        )
        # All patches of all pictures in one sequence -> (visual_tokens, hidden) per picture.
        features = self.model.get_image_features(
            inputs["pixel_values"].to(self.device, self.dtype),
            inputs["image_grid_thw"].to(self.device),
        ).pooler_output
        return list(features)

    def positions(self, prompt: Prompt, start: int, length: int) -> Tensor:
        """M-RoPE positions: time, row and column, shape `(3, 1, length)`.

        In text, all three count up by one per token. A picture's tokens have their row and column
        on its grid, counted from the position that the text has reached. The text after a picture
        continues after the longer side of its grid, so there are fewer positions than tokens.
        """
        skipped = self.layout.visual_tokens - max(self.layout.grid)
        passed = sum(place.stop <= start for place in prompt.images)
        begin = start - passed * skipped
        positions = torch.arange(begin, begin + length, device=self.device).repeat(3, 1)
        for number, place in enumerate(prompt.images[passed:], passed):
            first, last = max(place.start, start), min(place.stop, start + length)
            if first >= last:
                break
            positions[:, last - start :] -= skipped
            positions[:, first - start : last - start] = self._cells[
                :, first - place.start : last - place.start
            ] + (place.start - number * skipped)
        return positions[:, None]

    def fitted(self, picture: Image) -> Image:
        view = self.layout.view
        if picture.size == view:
            return picture
        return picture.resize(view, PillowImage.Resampling.BICUBIC)


def _check_parts(processor: Any, config: Any) -> None:
    """Refuse a tokenizer or an image processor that does not belong to the weights."""
    ids = {
        _IMAGE_TOKEN: config.image_token_id,
        _AROUND_PICTURE[0]: config.vision_start_token_id,
        _AROUND_PICTURE[1]: config.vision_end_token_id,
    }
    for token, expected in ids.items():
        # A token that is not special would be found in the text of a question too.
        added = processor.tokenizer.added_tokens_decoder.get(expected)
        if str(added) != token:
            raise ModelError(
                f"the checkpoint's tokenizer has no special token {token!r} with id {expected}; "
                "tokenizer and weights do not belong together"
            )
    if "image_grid_thw" not in processor.image_processor.model_input_names:
        raise ModelError(
            f"the checkpoint's image processor is a {type(processor.image_processor).__name__}, "
            "which gives no grid of patches; image processor and weights do not belong together"
        )
    vision = config.vision_config
    sides = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for name, expected in sides.items():
        found = getattr(processor.image_processor, name)
        if found != expected:
            raise ModelError(
                f"the checkpoint's image processor has {name} {found}, its vision tower "
                f"{expected}; image processor and weights do not belong together"
            )
