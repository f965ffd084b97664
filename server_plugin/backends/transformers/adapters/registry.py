"""From `config.model_type` to the adapter of a family."""

from __future__ import annotations

from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.instructblip import InstructBlipAdapter
from server_plugin.backends.transformers.adapters.llava import LlavaAdapter
from server_plugin.backends.transformers.adapters.qwen2_5_vl import Qwen25VLAdapter
from vlm_collab.errors import ModelError

ADAPTERS: tuple[type[Adapter], ...] = (LlavaAdapter, InstructBlipAdapter, Qwen25VLAdapter)
"""Every family there is. A new one is added here."""


def adapter_for(model_type: str) -> type[Adapter]:
    """The adapter that serves an architecture.

    Args:
        model_type: as in the checkpoint's `config.json`.

    Raises:
        ModelError: none does; the line says which are supported and how to add one.
    """
    for adapter in ADAPTERS:
        if model_type in adapter.model_types:
            return adapter
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise ModelError(
        f"models of type {model_type!r} are not supported; supported: {known}; "
        "a family is added with one adapter file, one YAML preset (docs/models.md)"
    )
