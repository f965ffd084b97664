"""What differs between model families, as one small interface.

A family is one subclass of `Adapter` in this folder, one line in `registry.py`, and one YAML
preset in `configs/models/`. The backend does everything else: caches, passes, generation,
attention rows, threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

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
        seen_numbers: numbers that `Adapter.see` gives for a picture, with `reads_question`,
            where they are kept for later questions; else 0.
    """

    view: Size
    grid: Grid
    visual_tokens: int
    context_tokens: int
    seen_numbers: int = 0


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One picture as the decoder takes it.

    Attributes:
        embeddings: `(visual_tokens, hidden)`.
        looks: how much each visual token looks at each cell of the grid, `(visual_tokens,
            cells)`, for families whose visual tokens are not the cells themselves.
    """

    embeddings: Tensor
    looks: Tensor | None = None


class Adapter(ABC):
    """One loaded checkpoint of one family.

    Args:
        model: as `from_pretrained` gave it, in evaluation mode on its device.
        processor: tokenizer and image processor of the checkpoint.
        preset: how it is used.

    Attributes:
        family: the family's name, as presets have it.
        model_types: values of `config.model_type` that this adapter serves.
        layout: sizes of the view, its tokens and the context.
        reads_question: whether a picture's visual tokens depend on the question. If not, they
            open every prompt about the picture and are prefilled once.
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

    @classmethod
    @abstractmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        """Sizes of the view, its tokens and the context, from a checkpoint's configuration.

        Called before weights are read too, so that what cannot be served is refused at once.

        Raises:
            ModelError: a checkpoint that this adapter cannot serve.
            ConfigError: the preset asks of it what it cannot do.
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
        """Makes the token ids of a question, and says where its pictures lie."""

    @abstractmethod
    def see(self, pictures: Sequence[Image]) -> list[Tensor]:
        """The vision encoder's output: everything that depends on a picture alone.

        Args:
            pictures: RGB, any size; brought to the encoder's input first.

        Returns:
            One tensor for each picture, all of one shape; without `reads_question` these are
            the visual tokens, `(visual_tokens, hidden)`.
        """

    @abstractmethod
    def fitted(self, picture: Image) -> Image:
        """A picture in a shape of which the checkpoint's image processor loses nothing.

        Args:
            picture: RGB, any size; the global view itself comes back as it is.
        """

    def visual_tokens(self, seen: Tensor, question: str) -> VisualTokens:
        """Visual tokens of a picture in a prompt with this question.

        Args:
            seen: one picture's tensor from `see`.
            question: the user's text, or the generic instruction; only looked at with
                `reads_question`.
        """
        return VisualTokens(seen)

    def on_grid(self, row: Tensor, looks: Tensor | None) -> Tensor:
        """Attention to the cells of the grid.

        Args:
            row: attention to the visual tokens of the global view, `(visual_tokens,)`.
            looks: as in that picture's `VisualTokens`.

        Returns:
            Row-major, `(rows * columns,)`.
        """
        return row if looks is None else row @ looks

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of text tokens, shape `(len(ids), hidden)`."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.device)
        embeddings: Tensor = self.decoder.get_input_embeddings()(tokens)
        return embeddings

    def positions(self, prompt: Prompt, start: int, length: int) -> Tensor:
        """Position ids of `length` tokens of a prompt and its answer.

        Args:
            prompt: the whole prompt.
            start: index of the first of them; those from `len(prompt.ids)` on are the answer's.
            length: how many.

        Returns:
            Shape `(…, 1, length)`: what the decoder takes, with a batch axis of one before last.
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
        """Text of generated tokens, special tokens removed, stripped."""
        text: str = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


def square_cells(vision: Any, preset: Preset) -> tuple[int, int]:
    """Of a vision tower with one input size: its side in px, and patches along a side.

    Raises:
        ModelError: it has no square patches.
        ConfigError: the preset asks for another size.
    """
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not (isinstance(side, int) and isinstance(patch, int) and 0 < patch <= side):
        raise ModelError(f"the vision tower {vision.model_type!r} has no square patches")
    if preset.view_px not in (None, side):
        raise ConfigError(f"view_px {preset.view_px}: this model takes views of {side} px only")
    return side, side // patch
