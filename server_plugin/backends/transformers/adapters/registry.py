"""Registry of adapters, by `config.model_type`."""

from __future__ import annotations

from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.transformers.adapters.instructblip import InstructBlipAdapter
from server_plugin.backends.transformers.adapters.llava import LlavaAdapter
from server_plugin.backends.transformers.adapters.qwen2_5_vl import Qwen25VLAdapter
from vlm_collab.errors import ModelError

ADAPTERS: tuple[type[Adapter], ...] = (LlavaAdapter, InstructBlipAdapter, Qwen25VLAdapter)
"""All families. Add a new one here."""


def adapter_for(model_type: str) -> type[Adapter]:
    """Return the adapter for an architecture.

    Args:
        model_type: as in the checkpoint's `config.json`.

    Raises:
        ModelError: there is none; the message says which are supported and how to add one.
    """
    for adapter in ADAPTERS:
        if model_type in adapter.model_types:
            return adapter
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise ModelError(
        f"models of type {model_type!r} are not supported; supported: {known}; "
        "to add a family, write an adapter and a YAML preset (docs/models.md)"
    )
