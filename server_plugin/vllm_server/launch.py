"""`vlm-collab serve --backend vllm`: start vLLM's own server with this package's plugin.

The command's options are checked here and translated to vLLM's; all other options are passed on to
vLLM. Checks that need no vLLM come first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from server_plugin.backends.open import (
    DEMO_MODEL,
    FAKE_MODEL,
    checkpoint_of,
    preset_of,
    with_options,
)
from server_plugin.backends.vllm.setup import check_arguments, require_vllm
from server_plugin.engines.assembly import policy_of
from server_plugin.service.config import ServiceConfig
from vlm_collab.errors import ConfigError

PLUGIN = "vlm_collab"
"""Name of both entry points, and of this package's options in vLLM's `--additional-config`."""

# vLLM loads these groups by default, but not if VLLM_PLUGINS names any plugin.
_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """Arguments and environment of vLLM's server.

    Attributes:
        arguments: arguments of `vllm serve`.
        environment: additional environment variables.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def invocation(
    model: str,
    config: ServiceConfig,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any],
    options: Mapping[str, Any],
    dtype: str = "auto",
    batch: int | None = None,
    log_level: str | None = None,
    vllm_options: Sequence[str] = (),
) -> Invocation:
    """Translate the command's options to vLLM's. Reads the checkpoint's small files.

    Args:
        model: hub name, local folder, or "demo".
        config: addresses and access; already checked.
        preset: name or file of another preset than the model's own.
        overrides: fields of the preset by name; None leaves a field.
        options: other fields of `server_plugin.vllm_server.endpoint.EndpointOptions`.
        dtype, batch: see `server_plugin.backends.vllm.model.engine_options`.
        log_level: log level of vLLM's processes; None: vLLM's default.
        vllm_options: options of vLLM. They override those made here; for
            `--compilation-config`, key by key.

    Raises:
        ModelError: the checkpoint is missing, or of a family without an adapter.
        ConfigError: vLLM is not installed, an option has an invalid value, or vLLM does not serve
            the model.
    """
    if model == FAKE_MODEL:
        raise ConfigError("the fake model runs without vLLM; leave out --backend vllm")
    if config.port == 0:
        raise ConfigError("vLLM does not take port 0; name a free port with --port")
    _refuse_conflicting_options(vllm_options)
    from server_plugin.backends.transformers.adapters.checkpoint import local_or_hub
    from server_plugin.backends.vllm.model import check, engine_options

    source = local_or_hub(checkpoint_of(model))
    chosen = with_options(preset_of(model, preset), overrides)
    check(source, chosen, model)
    check_arguments(source, chosen, vllm_options)
    policy_of(chosen, options.get("policy"), options.get("policy_options", {}))
    require_vllm()
    set_overrides = {name: value for name, value in overrides.items() if value is not None}
    ours: dict[str, Any] = {**options, "overrides": set_overrides}
    if preset is not None:
        is_file = preset.endswith((".yaml", ".yml"))
        ours["preset"] = str(Path(preset).expanduser().absolute()) if is_file else preset
    elif model == DEMO_MODEL:
        ours["preset"] = DEMO_MODEL
    arguments = ["serve", source, "--host", config.host, "--port", str(config.port)]
    # By default vLLM ends running requests at once; an accepted question has to be answered.
    arguments += ["--shutdown-timeout", f"{config.limits.shutdown_grace_s:.0f}"]
    defaults = engine_options(chosen, dtype, batch)
    for name, value in defaults.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += [f"--{name.replace('_', '-')}", text]
    if model == DEMO_MODEL:
        arguments += ["--served-model-name", DEMO_MODEL]
    for name, file in (("certfile", config.tls_cert), ("keyfile", config.tls_key)):
        if file is not None:
            arguments += [f"--ssl-{name}", str(file)]
    arguments += _with_defaults(vllm_options, _COMPILATION_CONFIG, defaults["compilation_config"])
    arguments += [f"--additional-config.{PLUGIN}", json.dumps(ours)]
    environment = {"VLLM_PLUGINS": ",".join(sorted(_plugins()))}
    if config.token is not None:
        # Not on the command line, which all users of the machine can read.
        environment["VLLM_API_KEY"] = config.token
    if log_level is not None:
        environment["VLLM_LOGGING_LEVEL"] = log_level.upper()
    return Invocation(arguments=tuple(arguments), environment=environment)


def replace_process(invocation: Invocation) -> NoReturn:
    """Replace this process by vLLM's server, which then gets signals and sets the exit code."""
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", *invocation.arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, {**os.environ, **invocation.environment})


_ADDITIONAL_CONFIG = ("--additional-config",)
_COMPILATION_CONFIG = ("--compilation-config", "-cc")


def _named(argument: str) -> tuple[str, str, str | None]:
    """Split an argument: option in vLLM's spelling, key after a dot, and value."""
    name, equals, value = argument.partition("=")
    option, _, key = name.partition(".")
    return option.replace("_", "-"), key, value if equals else None


def _means(option: str, names: Sequence[str]) -> bool:
    """Whether vLLM's parser may read `option` as one of these; it accepts prefixes."""
    return len(option.lstrip("-")) > 0 and any(name.startswith(option) for name in names)


def _refuse_conflicting_options(vllm_options: Sequence[str]) -> None:
    for option, key, _ in map(_named, vllm_options):
        if _means(option, _ADDITIONAL_CONFIG) and not (key and option in _ADDITIONAL_CONFIG):
            raise ConfigError(
                "--additional-config already holds this command's options; give yours as "
                "--additional-config.KEY VALUE, or start `vllm serve` yourself (docs/vllm.md)"
            )
        if option == "--config":
            # In vLLM the command line overrides the file, and so do the options set here.
            raise ConfigError(
                "--config: this command's options would override those of the file; give them on "
                "the command line, or start `vllm serve` yourself (docs/vllm.md)"
            )


def _with_defaults(
    vllm_options: Sequence[str], names: Sequence[str], defaults: Mapping[str, str]
) -> list[str]:
    """Add default keys to each value of a dictionary option.

    vLLM does not merge dictionaries: it takes the last JSON value, or, if there are dotted keys,
    those under the spelling that came last. So each value gets the keys that it lacks.
    """
    result, dotted = list(vllm_options), dict[str, set[str]]()
    for index, (option, key, value) in enumerate(map(_named, vllm_options)):
        if not _means(option, names):
            continue
        if key:
            dotted.setdefault(option, set()).add(key.partition(".")[0])
        elif value is not None:
            result[index] = f"{vllm_options[index].partition('=')[0]}={_filled(value, defaults)}"
        elif index + 1 < len(vllm_options):
            result[index + 1] = _filled(vllm_options[index + 1], defaults)
    for option, keys in dotted.items():
        for key in defaults.keys() - keys:
            result += [f"{option}.{key}", defaults[key]]
    return result


def _filled(text: str, defaults: Mapping[str, str]) -> str:
    try:
        given = json.loads(text)
    except ValueError:
        return text  # vLLM reports the error
    if not isinstance(given, dict) or defaults.keys() <= given.keys():
        return text
    return json.dumps({**defaults, **given})


def _plugins() -> set[str]:
    """Return the plugins that vLLM has to load: its own selection and this one."""
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        return {*filter(None, named.split(",")), PLUGIN}
    return {PLUGIN} | {
        point.name for group in _DEFAULT_GROUPS for point in entry_points(group=group)
    }
