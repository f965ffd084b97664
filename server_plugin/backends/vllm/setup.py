"""Set-ups of vLLM that are refused whatever it runs on, before a model is loaded if that can be.

Nothing here needs vLLM. What depends on its internals is `server_plugin.backends.vllm.capture`'s to
refuse.
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
"""What vLLM calls the whole vocabulary where it counts log-probabilities."""


def require_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        ConfigError: it is not installed.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of that name is no package
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
    """Refuse set-ups of an engine that make a backend impossible; None is not known yet.

    Args:
        preset: how the model is used.
        replicas: `--data-parallel-size`.
        pictures: how many a prompt may have, `--limit-mm-per-prompt`.
        max_logprobs, logprobs_mode: as vLLM's options.

    Raises:
        ConfigError: rows would be missing, statistics not exact, or second passes impossible.
    """
    if replicas is not None and replicas > 1:
        # Each of its engines' workers believes to be the only one, so they cannot tell.
        raise ConfigError(
            "data parallelism inside one server: only the first replica would answer for its "
            "rows; run one server per replica, without --data-parallel-size"
        )
    if pictures is not None and pictures < 2:
        raise ConfigError(
            "the second pass shows two pictures: start vLLM with --limit-mm-per-prompt "
            f"'{{\"image\": 2}}' or more, not {pictures}"
        )
    exact = max_logprobs in (None, EVERY_LOGPROB)
    if preset.metric is Metric.ENTROPY and not exact:
        raise ConfigError(
            "the metric entropy is exact only over the whole vocabulary: start vLLM with "
            "--max-logprobs -1, or choose min_entropy or margin"
        )
    if logprobs_mode not in (None, "raw_logprobs"):
        raise ConfigError(
            "uncertainty is defined on the raw logits: vLLM's --logprobs-mode must be "
            f"raw_logprobs, not {logprobs_mode}"
        )


def check_revision(source: str, revision: str | None) -> None:
    """Refuse another revision of a model on the hub than its main one.

    Args:
        source: hub name, or local folder, which has no revisions.
        revision: what was asked for; None if nothing was.

    Raises:
        ConfigError: one line.
    """
    if revision is not None and not Path(source).is_dir():
        raise ConfigError(
            "--revision: prompts are made from the files of the model's main revision; download "
            "the other one, and name its folder instead of the model"
        )


def check_arguments(source: str, preset: Preset, arguments: Sequence[str]) -> None:
    """Refuse what can be seen to be wrong in arguments of `vllm serve`; vLLM itself reads the rest.

    Args:
        source: hub name, or local folder.
        preset: how the model is used.
        arguments: as on a command line.

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
    """What an option is set to: the last one counts, and vLLM takes `_` for `-`."""
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
