"""Adapter for LLaVA-1.5 and models like it: CLIP vision tower, projector, Llama decoder.

Covers `llava-hf/llava-1.5-*` and the embedded demo model. A picture is a run of image tokens in
the prompt, one per patch; a second picture is a second run directly after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image as PillowImage
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

from server_plugin.backends.transformers.adapters.base import Adapter, Layout, square_cells
from server_plugin.backends.transformers.adapters.prompts import PromptBuilder
from server_plugin.models.presets import Preset
from vlm_collab.errors import ModelError
from vlm_collab.geometry import Fit, Grid, Size

_LONGEST_ASPECT = 16


class LlavaAdapter(Adapter):
    """A `LlavaForConditionalGeneration` checkpoint.

    Raises:
        ModelError: tokenizer and model disagree on the image token, or the vision tower has no
            square patches.
    """

    family = "llava"
    model_types = ("llava",)

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        super().__init__(model, processor, preset)
        image_token: str = processor.image_token
        image_token_id: int = model.config.image_token_id
        if processor.tokenizer.convert_tokens_to_ids(image_token) != image_token_id:
            raise ModelError(
                f"the checkpoint's tokenizer has no image token {image_token!r} with id "
                f"{image_token_id}; tokenizer and weights do not belong together"
            )
        self._prompts = PromptBuilder(
            processor.tokenizer,
            preset.template,
            image_token=image_token,
            image_token_id=image_token_id,
            visual_tokens=self.layout.visual_tokens,
            context_tokens=self.layout.context_tokens,
            turn=preset.turn,
        )

    @classmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        side, cells = square_cells(config.vision_config, preset)
        extra = 0 if config.vision_feature_select_strategy == "default" else 1
        return Layout(
            view=Size(side, side),
            grid=Grid(rows=cells, columns=cells),
            visual_tokens=cells * cells + extra,
            context_tokens=config.text_config.max_position_embeddings,
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
        pixels: Tensor = self.processor.image_processor(
            images=[self.fitted(picture) for picture in pictures], return_tensors="pt"
        )["pixel_values"]
        # (pictures, 3, height, width) -> a sequence of (visual_tokens, hidden)
        features = self.model.get_image_features(
            pixel_values=pixels.to(self.device, self.dtype)
        ).pooler_output
        return list(features)

    def attention_per_cell(self, row: Tensor, cell_attention: Tensor | None) -> Tensor:
        # The "full" feature strategy keeps the class token before the patches.
        cells = self.layout.grid.rows * self.layout.grid.columns
        return row[len(row) - cells :]

    def fitted(self, picture: Image) -> Image:
        """Bring a picture to the view's shape if the checkpoint's own processor would crop it.

        The hub's processor crops the centre of every picture that is not square. The fit `crop`
        means just that; with the other fits it would cut off requested parts of a local view.
        """
        view = self.layout.view
        if picture.size == view:
            return picture
        if self.preset.fit is Fit.CROP:
            return _middle(picture)
        if self.preset.fit is Fit.PAD:
            mean = self.processor.image_processor.image_mean
            colour = tuple(round(channel * 255) for channel in mean)
            return ImageOps.pad(picture, view, PillowImage.Resampling.BICUBIC, color=colour)
        if self.processor.image_processor.size.get("height"):
            return picture  # the processor stretches it
        return picture.resize(view, PillowImage.Resampling.BICUBIC)


def _middle(picture: Image) -> Image:
    """Cut a very long picture down to its middle, which the processor's centre crop still shows.

    The processor scales before it crops, so a picture one pixel wide would become millions of
    pixels long.
    """
    width, height = picture.size
    most = _LONGEST_ASPECT * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return picture.crop((left, top, width - left, height - top))
