"""Open a checkpoint on the vLLM backend: checks first, then vLLM's engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from server_plugin.backends.transformers.adapters.base import Adapter, check_family, check_layer
from server_plugin.backends.transformers.adapters.checkpoint import (
    load_config,
    load_processor,
    local_or_hub,
    model_type_of,
)
from server_plugin.backends.transformers.adapters.registry import adapter_for
from server_plugin.backends.vllm.backend import VllmBackend
from server_plugin.backends.vllm.capture import SUPPORTED
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError, ModelError
from vlm_collab.method.policy import Metric

FAMILIES = ("llava", "qwen2.5-vl")
"""Families that both this package and the supported vLLM serve."""


def open_vllm_model(
    name_or_folder: str,
    preset: Preset,
    *,
    dtype: str = "auto",
    name: str | None = None,
    batch: int | None = None,
    engine: Mapping[str, Any] | None = None,
) -> VllmBackend:
    """Start vLLM's engine in this process, with workers in others. Blocks; may download.

    Args:
        name_or_folder: hub name, or local folder.
        preset: how the model is used; its family must be the checkpoint's.
        dtype: a torch floating point type; "auto" is float32 on the CPU, else the checkpoint's.
        name: the name that clients see; default: the hub name, or the folder's last part.
        batch: most requests that run together; None: vLLM's own choice.
        engine: arguments of vLLM's `AsyncEngineArgs`; they override those made here.

    Raises:
        ModelError: the checkpoint is missing, damaged or of a family without an adapter, or vLLM
            cannot load it.
        ConfigError: vLLM is not installed or rejects an option, it does not serve the family, or
            the preset does not fit the checkpoint.
    """
    source = local_or_hub(name_or_folder)
    served_name = name or (Path(source).resolve().name if Path(source).is_dir() else source)
    check(source, preset, served_name)
    # vLLM must not log to stdout, which may carry the command's JSON.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ConfigError(
            f"the vLLM backend needs the package {error.name!r}; install it with "
            "`pip install 'vlm-collab[vllm]'`"
        ) from error
    options = {"model": source, **engine_options(preset, dtype, batch)}
    try:
        started = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**options, **(engine or {})}))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"vLLM cannot serve {name_or_folder}: {reason}") from error
    try:
        return vllm_backend(started, source, preset, served_name)
    except BaseException:
        started.shutdown()
        raise


def engine_options(preset: Preset, dtype: str = "auto", batch: int | None = None) -> dict[str, Any]:
    """Return the arguments of vLLM's `AsyncEngineArgs` that a preset needs on this machine.

    Args:
        dtype, batch: as in `open_vllm_model`.
    """
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "limit_mm_per_prompt": {"image": 2},
        # Full CUDA graphs would skip the capture.
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},
    }
    if preset.metric is Metric.ENTROPY:
        options["max_logprobs"] = -1
    if current_platform.is_cpu():
        # The CPU default, 128 tokens per block, is more than some views have, and only whole blocks
        # are shared.
        options["block_size"] = 32
    if dtype != "auto":
        options["dtype"] = dtype
    elif current_platform.is_cpu():
        options["dtype"] = "float32"
    if batch is not None:
        options["max_num_seqs"] = batch
    return options


def vllm_backend(
    engine: Any, source: str, preset: Preset, served_name: str, *, owned: bool = True
) -> VllmBackend:
    """Make a backend for a running engine.

    Args:
        engine: `AsyncLLM`, or an engine client of vLLM's server.
        source: the folder or hub name that the engine has loaded.
        preset: how the model is used.
        served_name: the name that clients see.
        owned: whether closing the backend shuts the engine down.

    Raises:
        ModelError, ConfigError: as in `open_vllm_model`.
    """
    adapter_class = check(source, preset, served_name)
    adapter = weightless_adapter(adapter_class, source, preset, engine.model_config.max_model_len)
    return VllmBackend(engine, adapter, served_name, owned=owned)


def check(source: str, preset: Preset, served_name: str) -> type[Adapter]:
    """Refuse a checkpoint that cannot be served; reads its small files only.

    Raises:
        ModelError, ConfigError: as in `open_vllm_model`.
    """
    adapter_class = adapter_for(model_type_of(source))
    if adapter_class.family not in FAMILIES:
        raise ConfigError(
            f"vLLM {SUPPORTED} does not serve {adapter_class.family}; use --backend transformers"
        )
    check_family(adapter_class, preset, served_name)
    config = load_config(source)
    check_layer(preset, config.get_text_config(), served_name)
    adapter_class.layout_of(config, preset)
    return adapter_class


def weightless_adapter(
    adapter_class: type[Adapter], source: str, preset: Preset, context_tokens: int
) -> Adapter:
    """Make an adapter without weights, which builds prompts and decodes answers.

    Args:
        source: folder or hub name of the checkpoint.
        context_tokens: longest sequence that the engine takes; lowers the checkpoint's own limit.
    """
    config = load_config(source)
    text = config.get_text_config()
    text.max_position_embeddings = min(text.max_position_embeddings, context_tokens)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # no file; transformers then derives them from the configuration
        generation = GenerationConfig.from_model_config(config)
    model = SimpleNamespace(
        config=config,
        generation_config=generation,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return adapter_class(model, load_processor(source), preset)
