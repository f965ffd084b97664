"""The adapter interface: everything that differs between model families.

A family needs one subclass of `Adapter` in this folder, one line in `registry.py`, and one YAML
preset in `configs/models/`. The backend does the rest: caches, passes, generation, attention rows,
threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from server_plugin.backends.base import ModelInfo
from server_plugin.backends.transformers.adapters.prompts import Prompt, PromptBuilder
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError, ModelError
from vlm_collab.geometry import Grid, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a picture becomes visual tokens.

    Attributes:
        view: size of the encoder's input, in px.
        grid: the token grid of the relative attention map.
        visual_tokens: tokens of one picture in the decoder's context.
        context_tokens: longest sequence that the decoder takes.
        encoded_numbers: how many numbers `Adapter.encode` returns for a picture, in families with
            `reads_question`, which keep them for later questions; else 0.
    """

    view: Size
    grid: Grid
    visual_tokens: int
    context_tokens: int
    encoded_numbers: int = 0


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One picture as the input of the decoder.

    Attributes:
        embeddings: `(visual_tokens, hidden)`.
        cell_attention: attention of each visual token to each grid cell,
            `(visual_tokens, cells)`, in families whose visual tokens are not the cells
            themselves; else None.
    """

    embeddings: Tensor
    cell_attention: Tensor | None = None


class Adapter(ABC):
    """One loaded checkpoint of one family.

    Args:
        model: from `from_pretrained`, in evaluation mode on its device.
        processor: tokenizer and image processor of the checkpoint.
        preset: how the model is used.

    Attributes:
        family: the family's name in presets.
        model_types: values of `config.model_type` that this adapter serves.
        layout: sizes of the view, its tokens and the context.
        reads_question: whether a picture's visual tokens depend on the question. If not, they
            are at the start of every prompt about the picture and are prefilled once.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    reads_question: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        self.model = model
        self.processor = processor
        self.preset = preset
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.layout = self.layout_of(model.config, preset)

    def model_info(
        self, name: str, decoder_config: Any, *, concurrency: int, view_bytes: int
    ) -> ModelInfo:
        """Return the properties of the model that a backend reports.

        Args:
            name: the name that clients see.
            decoder_config: configuration of the text decoder.
            concurrency, view_bytes: see `ModelInfo`.
        """
        layout, preset = self.layout, self.preset
        return ModelInfo(
            name=name,
            view=layout.view,
            fit=preset.fit,
            grid=layout.grid,
            base_px=preset.base_px or max(layout.view),
            layer=preset.layer,
            hidden_size=decoder_config.hidden_size,
            layers=decoder_config.num_hidden_layers,
            visual_tokens=layout.visual_tokens,
            context_tokens=layout.context_tokens,
            concurrency=concurrency,
            view_bytes=view_bytes,
        )

    @classmethod
    @abstractmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        """Return sizes of the view, its tokens and the context, from a checkpoint's configuration.

        Also called before weights are read, so that an unsupported checkpoint is refused at once.

        Raises:
            ModelError: this adapter cannot serve the checkpoint.
            ConfigError: the checkpoint cannot do what the preset asks.
        """

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The text decoder: embeddings in, hidden states out, without the output head."""

    @property
    @abstractmethod
    def output_head(self) -> Any:
        """From hidden states `(…, hidden)` to raw logits `(…, vocabulary)`."""

    @property
    @abstractmethod
    def prompts(self) -> PromptBuilder:
        """Builds the token ids of a question, with the positions of its pictures."""

    @abstractmethod
    def encode(self, pictures: Sequence[Image]) -> list[Tensor]:
        """Run the vision encoder: everything that depends on a picture alone.

        Args:
            pictures: RGB, any size; they are resized to the encoder's input first.

        Returns:
            One tensor for each picture, all of one shape. Without `reads_question` these are the
            visual tokens, `(visual_tokens, hidden)`.
        """

    @abstractmethod
    def fitted(self, picture: Image) -> Image:
        """Bring a picture to a shape from which the checkpoint's image processor cuts nothing off.

        Args:
            picture: RGB, any size. A picture of the view's size is returned unchanged.
        """

    def visual_tokens(self, encoded: Tensor, question: str) -> VisualTokens:
        """Return the visual tokens of a picture in a prompt with this question.

        Args:
            encoded: one picture's tensor from `encode`.
            question: the user's text, or the generic instruction; used only with
                `reads_question`.
        """
        return VisualTokens(encoded)

    def attention_per_cell(self, row: Tensor, cell_attention: Tensor | None) -> Tensor:
        """Convert attention to visual tokens into attention to grid cells.

        Args:
            row: attention to the visual tokens of the global view, `(visual_tokens,)`.
            cell_attention: see `VisualTokens`.

        Returns:
            Row-major, `(rows * columns,)`.
        """
        return row if cell_attention is None else row @ cell_attention

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embeddings of text tokens, shape `(len(ids), hidden)`."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.device)
        embeddings: Tensor = self.decoder.get_input_embeddings()(tokens)
        return embeddings

    def positions(self, prompt: Prompt, start: int, length: int) -> Tensor:
        """Return position ids of tokens of a prompt and its answer.

        Args:
            prompt: the whole prompt.
            start: index of the first token; indices from `len(prompt.ids)` on are the answer's.
            length: number of tokens.

        Returns:
            Shape `(…, 1, length)`, as the decoder takes it; the axis before the last is the batch.
        """
        return torch.arange(start, start + length, device=self.device)[None]

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer, from the checkpoint's generation settings."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            return frozenset()
        return frozenset([end] if isinstance(end, int) else end)

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode generated tokens: special tokens removed, white space stripped."""
        text: str = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


def check_family(adapter: type[Adapter], preset: Preset, name: str) -> None:
    """Refuse a preset for another family.

    Args:
        adapter: of the checkpoint's family.
        name: of the checkpoint.

    Raises:
        ConfigError: the preset is for another family.
    """
    if preset.family != adapter.family:
        raise ConfigError(
            f"the preset is for the family {preset.family!r}, but {name} is of {adapter.family!r}"
        )


def check_layer(preset: Preset, decoder_config: Any, name: str) -> None:
    """Refuse a preset whose layer the decoder does not have.

    Args:
        decoder_config: configuration of the text decoder.
        name: of the checkpoint.

    Raises:
        ConfigError: the layer does not exist.
    """
    layers = decoder_config.num_hidden_layers
    if preset.layer >= layers:
        raise ConfigError(
            f"layer {preset.layer} does not exist: {name} has decoder layers 0 to {layers - 1}; "
            "choose one with the option `layer`"
        )


def square_cells(vision: Any, preset: Preset) -> tuple[int, int]:
    """Return side in px and patches per side of a vision tower with one input size.

    Raises:
        ModelError: the tower has no square patches.
        ConfigError: the preset asks for another size.
    """
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not (isinstance(side, int) and isinstance(patch, int) and 0 < patch <= side):
        raise ModelError(f"the vision tower {vision.model_type!r} has no square patches")
    if preset.view_px not in (None, side):
        raise ConfigError(f"view_px {preset.view_px}: this model takes views of {side} px only")
    return side, side // patch
