"""Open a model by name: find its checkpoint, preset and backend.

This module imports neither torch nor transformers; the chosen backend does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack

from server_plugin.backends.base import Backend
from server_plugin.models.presets import (
    Preset,
    load_preset,
    preset_for_family,
    preset_for_model,
    preset_named,
)
from vlm_collab.errors import ConfigError, ModelError
from vlm_collab.method.policy import Aggregate

DEMO_MODEL = "demo"
FAKE_MODEL = "fake"

TRANSFORMERS, VLLM = "transformers", "vllm"
"""Names of the model runtimes."""


def demo_package() -> ModuleType:
    """Import `vlm_collab_demo`, which the distribution `vlm-collab-demo` brings.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return import_module("vlm_collab_demo")
    except ModuleNotFoundError:
        raise ModelError(
            "the demo model is not installed; install it with `pip install vlm-collab-demo` "
            "(in a checkout: `pip install -e ./demo`), or name another model"
        ) from None


def demo_folder() -> Path:
    """Folder of the demo checkpoint.

    Raises:
        ModelError: it is not installed.
    """
    return Path(demo_package().DEMO_MODEL)


class PresetOverrides(TypedDict, total=False):
    """Fields of a preset that a user may replace; see `Preset`. None keeps a field."""

    fit: str | None
    prompt: str | None
    layer: int | None
    ratios: Sequence[float] | None
    base_px: int | None
    view_px: int | None
    epsilon: float | None
    placement: str | None
    metric: str | None
    aggregate: str | None
    eta: float | None
    k: int | None
    max_new_tokens: int | None


def open_model(
    name: str | None = None,
    *,
    preset: str | Preset | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    backend: str = TRANSFORMERS,
    **overrides: Unpack[PresetOverrides],
) -> tuple[Backend, Preset]:
    """Open a model. Blocks while it loads; a hub name may be downloaded.

    Args:
        name: None or "demo" for the demo model, "fake" for the scripted backend
            without a model, else a local folder or a name on the hub.
        preset: a preset, the name of one in `configs/models/`, or the path of a YAML file.
            Default: the one whose globs match `name`, else the family's default.
        device: a torch device, or "auto": CUDA if available, else the CPU.
        dtype: a torch floating point type, or "auto": float32 on the CPU; on CUDA bfloat16, and
            with vLLM the checkpoint's own.
        batch: most questions that run together; None: a small number that suits the device.
        backend: "transformers" or "vllm".
        overrides: replace the preset's fields of these names; None keeps them.

    Returns:
        The backend, and the preset with all replacements, for policy and engine.

    Raises:
        ModelError: the checkpoint is missing, damaged, or of a family without an adapter.
        ConfigError: there is no such preset, an option has an impossible value, or the server's
            packages are not installed.
    """
    if backend not in (TRANSFORMERS, VLLM):
        raise ConfigError(f"there is no backend {backend!r}; there are: transformers, vllm")
    if backend == VLLM and device != "auto":
        raise ConfigError(f"vLLM chooses its devices itself; it takes no device {device!r}")
    chosen = with_options(preset_of(name, preset), overrides)
    if name == FAKE_MODEL:
        from server_plugin.backends.fake import FakeBackend

        fake = FakeBackend.demo()
        view_px, side = overrides.get("view_px"), fake.info.view.width
        if view_px not in (None, side):
            raise ConfigError(f"model option: view_px of the fake model is {side}, not {view_px}")
        fake.info = replace(fake.info, fit=chosen.fit)
        return fake, chosen
    source = checkpoint_of(name)
    served_name = DEMO_MODEL if name in (None, DEMO_MODEL) else None
    if backend == VLLM:
        from server_plugin.backends.vllm.setup import require_vllm

        require_vllm()
        _require_server_packages()
        from server_plugin.backends.vllm.model import open_vllm_model

        return open_vllm_model(source, chosen, dtype=dtype, name=served_name, batch=batch), chosen
    _require_server_packages()
    from server_plugin.backends.transformers.backend import TransformersBackend

    loaded = TransformersBackend.load(
        source, chosen, device=device, dtype=dtype, name=served_name, batch=batch
    )
    return loaded, chosen


def with_options(preset: Preset, overrides: Mapping[str, Any]) -> Preset:
    """Return a preset with some fields replaced by a user's options.

    Raises:
        ConfigError: a field is unknown, or a value is invalid or has no effect.
    """
    chosen = preset.with_overrides(**overrides)
    if not math.isfinite(chosen.epsilon):
        raise ConfigError(f"model option: epsilon must be a finite number, not {chosen.epsilon}")
    if overrides.get("k") is not None and chosen.aggregate is not Aggregate.FIRST_K:
        raise ConfigError(f"model option: k needs the aggregate first_k, not {chosen.aggregate}")
    return chosen


def checkpoint_and_preset(name: str, preset: str | Preset | None = None) -> tuple[str, Preset]:
    """Find the checkpoint and preset that `open_model` would open; arguments as there.

    Returns:
        A local folder or hub name, and the preset.

    Raises:
        ModelError: the checkpoint is missing, or of a family without an adapter.
        ConfigError: `name` is the fake model, or the server's packages are not installed.
    """
    if name == FAKE_MODEL:
        raise ConfigError("the fake model has no checkpoint")
    _require_server_packages()
    return checkpoint_of(name), preset_of(name, preset)


def checkpoint_of(name: str | None) -> str:
    """Return the local folder or hub name for a model's name.

    Raises:
        ModelError: the demo model is not installed.
    """
    if name not in (None, DEMO_MODEL):
        return name
    return str(demo_folder())


def preset_of(name: str | None, preset: str | Preset | None = None) -> Preset:
    """Return the preset for a model; arguments as in `open_model`.

    Raises:
        ModelError, ConfigError: as in `open_model`.
    """
    if isinstance(preset, Preset):
        return preset
    if preset is not None:
        is_file = preset.endswith((".yaml", ".yml"))
        return load_preset(Path(preset).expanduser()) if is_file else preset_named(preset)
    if name is None or name in (DEMO_MODEL, FAKE_MODEL):
        return preset_named(DEMO_MODEL)
    if (by_name := preset_for_model(name)) is not None:
        return by_name
    _require_server_packages()
    from server_plugin.backends.transformers.adapters.checkpoint import local_or_hub, model_type_of
    from server_plugin.backends.transformers.adapters.registry import adapter_for

    return preset_for_family(adapter_for(model_type_of(local_or_hub(name))).family)


def _require_server_packages() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"models need the package {error.name!r}; install them with "
            "`pip install 'vlm-collab[server]'`"
        ) from error
