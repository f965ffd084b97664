# mypy: disable-error-code="import-not-found,import-untyped"
"""What lmms-eval finds under its entry-point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The name of the model, and where its class is. Called at every start of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlm_collab", simple_class_path="eval.lmms_plugin.model.VlmCollab"
    )
