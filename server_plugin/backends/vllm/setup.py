"""Checks of vLLM's settings, before a model is loaded if possible.

Nothing here needs vLLM. Checks that depend on its internals are in
`server_plugin.backends.vllm.capture`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric

EVERY_LOGPROB = -1
"""vLLM's number of log-probabilities that means the whole vocabulary."""


def require_vllm() -> None:
    """Check that vLLM is installed.

    Raises:
        ConfigError: it is not.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of that name is not a package
        raise ConfigError(
            "the vLLM backend needs vLLM; install it with `pip install 'vlm-collab[vllm]'`"
        )


def check_setup(
    preset: Preset,
    *,
    replicas: int | None = None,
    pictures: int | None = None,
    max_logprobs: int | None = None,
    logprobs_mode: str | None = None,
) -> None:
    """Refuse settings of an engine with which the backend cannot work; None means not known yet.

    Args:
        preset: how the model is used.
        replicas: `--data-parallel-size`.
        pictures: most pictures in a prompt, `--limit-mm-per-prompt`.
        max_logprobs, logprobs_mode: vLLM's options of these names.

    Raises:
        ConfigError: rows would be missing, statistics inexact, or second passes impossible.
    """
    if replicas is not None and replicas > 1:
        # Workers of each replica see a data-parallel size of 1, so they cannot check this.
        raise ConfigError(
            "data parallelism inside one server would lose attention rows; run one server per "
            "replica, without --data-parallel-size"
        )
    if pictures is not None and pictures < 2:
        raise ConfigError(
            "the second pass needs two pictures in a prompt: start vLLM with "
            f"--limit-mm-per-prompt '{{\"image\": 2}}' or more, not {pictures}"
        )
    exact = max_logprobs in (None, EVERY_LOGPROB)
    if preset.metric is Metric.ENTROPY and not exact:
        raise ConfigError(
            "the metric entropy needs the whole vocabulary: start vLLM with "
            "--max-logprobs -1, or choose min_entropy or margin"
        )
    if logprobs_mode not in (None, "raw_logprobs"):
        raise ConfigError(
            "uncertainty is defined on the raw logits: vLLM's --logprobs-mode must be "
            f"raw_logprobs, not {logprobs_mode}"
        )


def check_revision(source: str, revision: str | None) -> None:
    """Refuse any revision of a model on the hub but the main one.

    Args:
        source: hub name, or local folder, which has no revisions.
        revision: the requested revision, if any.

    Raises:
        ConfigError: another revision was requested.
    """
    if revision is not None and not Path(source).is_dir():
        raise ConfigError(
            "--revision: not supported, because prompts are made from the files of the main "
            "revision; download the other revision, and name its folder instead of the model"
        )


def check_arguments(source: str, preset: Preset, arguments: Sequence[str]) -> None:
    """Check arguments of `vllm serve` as far as this package knows them; vLLM checks the rest.

    Args:
        source: hub name, or local folder.
        preset: how the model is used.
        arguments: arguments of the command line.

    Raises:
        ConfigError: see `check_setup` and `check_revision`.
    """
    check_revision(source, _value(arguments, "--revision"))
    check_setup(
        preset,
        replicas=_number(_value(arguments, "--data-parallel-size", "-dp")),
        pictures=_pictures(_value(arguments, "--limit-mm-per-prompt")),
        max_logprobs=_number(_value(arguments, "--max-logprobs")),
        logprobs_mode=_value(arguments, "--logprobs-mode"),
    )


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """Return an option's value. The last occurrence counts, and vLLM treats `_` as `-`."""
    found = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") in names:
            found = value if equals else following
    return found


def _number(text: str | None) -> int | None:
    with suppress(TypeError, ValueError):
        return int(text)  # type: ignore[arg-type]
    return None


def _pictures(limits: str | None) -> int | None:
    with suppress(TypeError, ValueError, AttributeError):
        count = json.loads(limits).get("image")  # type: ignore[arg-type]
        return count if isinstance(count, int) else None
    return None
