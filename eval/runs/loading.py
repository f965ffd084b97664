"""Opening of a run's model, and its entry in the run's provenance."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eval.runs.provenance import weights_digest
from server_plugin.backends.base import Backend, ModelInfo
from server_plugin.backends.open import (
    FAKE_MODEL,
    checkpoint_of,
    open_model,
    preset_of,
    with_options,
)
from server_plugin.models.presets import Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """A user's options for the model.

    Attributes:
        name: as for `open_model`.
        device, dtype: as for `open_model`; `settled` resolves "auto", so that a run can record it.
        batch: most questions that run together.
        overrides: other arguments of `open_model` that were given.
    """

    name: str
    device: str = "auto"
    dtype: str = "auto"
    batch: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def preset(self) -> Preset:
        """The preset with the given overrides. Nothing is loaded.

        Raises:
            CollabError: as `open_model`, for errors that show without the weights.
        """
        given = dict(self.overrides)
        return with_options(preset_of(self.name, given.pop("preset", None)), given)

    def settled(self) -> tuple[str, str]:
        """Device and floating point type, with "auto" resolved.

        Several processes on one machine get CUDA devices of their own, as far as there are enough.
        """
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and torch.cuda.is_available():
            place = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            device = f"cuda:{place}"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        return device, dtype


async def loaded(options: ModelOptions, max_new_tokens: int) -> tuple[Backend, Preset]:
    """Open the model.

    Args:
        options: the user's options.
        max_new_tokens: the benchmark's longest answer; the user's option takes precedence.

    Raises:
        CollabError: it cannot be opened.
    """
    device, dtype = options.settled()
    overrides = {"max_new_tokens": max_new_tokens, **options.overrides}
    return await asyncio.to_thread(
        open_model, options.name, device=device, dtype=dtype, batch=options.batch, **overrides
    )


def facts_of(options: ModelOptions, info: ModelInfo, preset: Preset) -> dict[str, Any]:
    """The model's entry in `run.json`; reads all weights once, for their digest."""
    device, dtype = options.settled()
    source = None if options.name == FAKE_MODEL else checkpoint_of(options.name)
    return {
        "name": info.name,
        "weights": None if source is None else weights_digest(source),
        "preset": msgspec.to_builtins(preset),
        "dtype": dtype,
        "device": device.partition(":")[0],
        "concurrency": info.concurrency,
        "view": list(info.view),
        "grid": list(info.grid),
        "base_px": info.base_px,
        "visual_tokens": info.visual_tokens,
        "hidden_size": info.hidden_size,
        "layers": info.layers,
    }
