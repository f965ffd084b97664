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

from server_plugin.adapters.prompts import PromptBuilder
from server_plugin.presets import Preset
from vlm_collab.geometry import Grid, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a picture becomes visual tokens.

    Attributes:
        view: size of the encoder's input, in px.
        grid: the token grid of the relative attention map.
        visual_tokens: tokens of one picture in the decoder's context.
        on_grid: which of them are the grid's cells, in row-major order.
        context_tokens: longest sequence that the decoder takes.
    """

    view: Size
    grid: Grid
    visual_tokens: int
    on_grid: slice
    context_tokens: int


class Adapter(ABC):
    """One loaded checkpoint of one family.

    Args:
        model: as `from_pretrained` gave it, in evaluation mode on its device.
        processor: tokenizer and image processor of the checkpoint.
        preset: how it is used.

    Attributes:
        family: the family's name, as presets have it.
        model_types: values of `config.model_type` that this adapter serves.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        self.model = model
        self.processor = processor
        self.preset = preset
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Sizes of the view, its tokens and the context."""

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
    def encode(self, picture: Image) -> Tensor:
        """Visual tokens of one picture, as the decoder takes them.

        Args:
            picture: RGB, any size; brought to the encoder's input first.

        Returns:
            Shape `(visual_tokens, hidden)`.
        """

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of text tokens, shape `(len(ids), hidden)`."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.device)
        embeddings: Tensor = self.decoder.get_input_embeddings()(tokens)
        return embeddings

    def positions(self, start: int, length: int) -> Tensor:
        """Position ids of `length` tokens that follow `start` others, shape `(1, length)`."""
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
