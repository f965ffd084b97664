# mypy: disable-error-code="import-not-found,import-untyped"
"""Entry point of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Name and class of the model. lmms-eval calls this at every start."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlm_collab", simple_class_path="eval.lmms_plugin.model.VlmCollab"
    )
