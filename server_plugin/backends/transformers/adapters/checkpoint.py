"""Checkpoints: find the architecture, load the parts, and report errors in one line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging as transformers_logging

from vlm_collab.errors import ModelError

_FILE_FAULTS = (
    OSError, ValueError, LookupError, TypeError, ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors that transformers, safetensors and the standard library raise for missing or damaged
files, and for files that need a package which is not installed."""

_HUB_TIMEOUT_S = 5.0

_CHATTY = ("huggingface_hub", "httpx", "httpx2")
"""Loggers that report every request and retry. What matters is raised as `ModelError`."""

# Typed `Any`: their annotations do not cover what `from_pretrained` returns, or are missing.
_PROCESSORS: Any = AutoProcessor
_TOKENIZERS: Any = AutoTokenizer
_IMAGE_PROCESSORS: Any = AutoImageProcessor
_MODELS: Any = AutoModelForImageTextToText
_BARS: Any = transformers_logging
_DOWNLOAD_BARS: Any = hub_utils


@dataclass(frozen=True, slots=True)
class Processor:
    """Tokenizer and image processor, if the checkpoint's whole processor cannot be loaded."""

    tokenizer: Any
    image_processor: Any


def local_or_hub(name: str) -> str:
    """Return a checkpoint's name as transformers takes it, with `~` expanded.

    Raises:
        ModelError: the name can only be a folder, and there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    # A hub name is `name` or `owner/name`; everything else can only be a path.
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model folder {name}")
    return name


def model_type_of(name: str) -> str:
    """Return the architecture of a checkpoint, from its `config.json`.

    Args:
        name: local folder or hub name, from `local_or_hub`. The same holds for the functions below.

    Raises:
        ModelError: the checkpoint is missing, cannot be reached, or has no usable `config.json`.
    """
    with _one_line(name, "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(name, **_where(name))
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise ModelError(
            f"{name} is not a model checkpoint: it has no config.json with a model_type"
        )
    return model_type


def load_config(name: str) -> Any:
    """Load the configuration of a checkpoint.

    Raises:
        ModelError: `config.json` is missing or does not fit its architecture.
    """
    with _one_line(name, "config.json"):
        return AutoConfig.from_pretrained(name, **_where(name))


def load_processor(name: str) -> Any:
    """Load tokenizer and image processor of a checkpoint.

    Returns:
        The checkpoint's own processor; a `Processor` of the two if packages for video are missing.

    Raises:
        ModelError: one of them is missing or damaged.
    """
    with _one_line(name, "tokenizer or image processor"):
        where = _where(name)
        try:
            processor = _processor_class(name).from_pretrained(name, **where)
        except (ImportError, ValueError) as error:
            # Processors of some families also take videos, and need torchvision only for these.
            if "torchvision" not in str(error).lower():
                raise
            processor = Processor(
                _TOKENIZERS.from_pretrained(name, **where),
                _IMAGE_PROCESSORS.from_pretrained(name, **where),
            )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ModelError(f"{name} has no {part.replace('_', ' ')}")
    return processor


def _processor_class(name: str) -> Any:
    """Return the processor class of the checkpoint's architecture.

    `AutoProcessor` uses the name in `processor_config.json`, which in some checkpoints on the hub
    is that of a related architecture.
    """
    config = type(load_config(name))
    return PROCESSOR_MAPPING.get(config, _PROCESSORS)


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the weights of a checkpoint to a device, in evaluation mode.

    Only safetensors files are read: other formats can run code.

    Raises:
        ModelError: weights are missing, truncated, or do not have the configuration's shapes.
    """
    with _one_line(name, "weights"):
        model, report = _MODELS.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            # Mismatches then are in the report, and are refused below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_where(name),
        )
    for kind in ("mismatched_keys", "missing_keys"):
        # transformers would use random values in their place.
        if keys := report[kind]:
            first = sorted(str(key) for key in keys)[0]
            raise ModelError(
                f"{name} is incomplete or damaged: {len(keys)} weights do not fit its "
                f"config.json ({kind.replace('_', ' ')}, such as {first})"
            )
    return model.to(device).eval()


def _where(name: str) -> dict[str, bool]:
    """Return arguments of `from_pretrained` for a folder or a hub name.

    Raises:
        ModelError: the hub cannot be reached, and nothing of the checkpoint is cached.
    """
    return {"local_files_only": Path(name).is_dir() or not _hub_answers(name)}


def _hub_answers(name: str) -> bool:
    """Whether the hub answers. If not, raise `ModelError` unless the checkpoint is cached.

    Without this check, the library would try each missing file for half a minute.
    """
    url = hf_hub_url(name, "config.json")
    try:
        get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S)
    except HFValidationError:
        raise  # not a valid hub name
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            return True  # it answered; `from_pretrained` gives the best error
        reason = str(error)
    # Versions of huggingface_hub use different HTTP libraries, without a common base error.
    except Exception as error:
        reason = str(error) or type(error).__name__
    else:
        return True
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        hub = url.partition(f"/{name}/")[0]
        raise ModelError(
            f"{name} is neither a folder nor in the local cache, and {hub} cannot be reached: "
            f"{_shortened(' '.join(reason.split()))}"
        )
    return False


@contextlib.contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """Turn errors while loading into one-line `ModelError`s, and keep stderr to progress bars."""
    try:
        with _quiet():
            yield
    except Exception as error:
        # The tokenizers library raises bare `Exception`. Any other error is a bug in this package
        # and is raised unchanged.
        if not (isinstance(error, _FILE_FAULTS) or type(error) is Exception):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: cannot load its {what}: {_shortened(reason)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence log lines about requests and progress bars for reading weights from a disk.

    Downloads show progress bars only on a terminal.
    """
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    bars = _BARS.is_progress_bar_enabled()
    downloads = not _DOWNLOAD_BARS.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    _BARS.disable_progress_bar()  # the hub's too
    if downloads and sys.stderr.isatty():
        _DOWNLOAD_BARS.enable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            _BARS.enable_progress_bar()
        if downloads:
            _DOWNLOAD_BARS.enable_progress_bars()
        else:
            _DOWNLOAD_BARS.disable_progress_bars()


def _shortened(reason: str, limit: int = 200) -> str:
    return reason if len(reason) <= limit else f"{reason[:limit].rstrip()}…"
