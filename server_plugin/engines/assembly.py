"""Build an engine from a preset and a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server_plugin.backends.base import Backend
from server_plugin.engines.two_stage import Engine
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Size
from vlm_collab.method.policy import Policy, policy_from_config


def policy_of(preset: Preset, policy: str | None, options: Mapping[str, Any]) -> Policy:
    """Return the policy that decides whether a region is requested.

    Args:
        preset: gives metric, aggregate and threshold.
        policy: `always`, `never` or `random` instead of the preset's threshold policy.
        options: options of that policy; those that are None are ignored.

    Raises:
        ConfigError: the policy is unknown, or does not take an option.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if policy not in (None, "threshold"):
        fields = {"metric": preset.metric.value, "aggregate": preset.aggregate.value}
        return policy_from_config({"kind": policy, "k": preset.k, **fields, **given})
    if given:
        raise ConfigError(f"--{next(iter(given))} needs --policy random")
    return preset.policy()


def engine_of(
    backend: Backend,
    preset: Preset,
    policy: str | None,
    policy_options: Mapping[str, Any],
    *,
    provisional: bool = False,
) -> Engine:
    """Build the engine that a preset describes.

    Args:
        policy, policy_options: see `policy_of`.
        provisional: see `Engine`.

    Raises:
        ConfigError: see `policy_of`.
    """
    side = preset.local_view_px
    return Engine(
        backend=backend,
        policy=policy_of(preset, policy, policy_options),
        ratios=preset.ratios,
        placement=preset.placement,
        max_new_tokens=preset.max_new_tokens,
        local_view=None if side is None else Size(side, side),
        provisional=provisional,
    )
