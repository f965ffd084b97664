"""Parse the options in `--model_args`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from server_plugin.backends.open import DEMO_MODEL
from vlm_collab.cli.secret_files import TOKEN_VARIABLE, read_key
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Retransmit

Quality = Annotated[int, msgspec.Meta(ge=1, le=100)]
Positive = Annotated[int, msgspec.Meta(ge=1)]

DEFAULT_MAX_NEW_TOKENS = 64
"""Answer length if neither the task nor the user sets one, as in TextVQA (`eval.tasks`)."""

DEFAULT_CONCURRENCY = 16

_POLICIES = {
    "threshold": Retransmit.AUTO,
    "always": Retransmit.ALWAYS,
    "never": Retransmit.NEVER,
}

_PRESET = (
    "preset", "fit", "prompt", "view_px", "layer", "base_px", "placement", "epsilon",
    "metric", "aggregate", "eta", "k",
)  # fmt: skip
"""Options that are passed on to `open_model`."""

_IN_PROCESS = (
    "pretrained", "batch", "device", "dtype", "region_quality",
    *(name for name in _PRESET if name != "eta"),
)  # fmt: skip
"""Options that the service sets, so that `server` excludes them."""


class LmmsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `--model vlm_collab`.

    Attributes:
        pretrained: the model, as in `vlm-collab serve`; default without `server`: the demo model.
        server, token, token_file: address of a running service (`ws://…`), its bearer token, and
            a file with the token. lmms-eval prints its arguments, so prefer the file.
        policy: when a region is sent: "threshold", "always", "never".
        eta: threshold, instead of the preset's or the service's.
        metric, aggregate, k: the uncertainty that is compared with it.
        codec, view_quality, region_quality: how pictures are encoded, instead of the preset's.
        max_new_tokens: longest answer, whatever a task asks for.
        batch: most questions in a batch of the model in this process.
        concurrency: most questions in flight at a service.
        device, dtype, preset, fit, prompt, view_px, layer, base_px, placement, epsilon: see
            `server_plugin.backends.open.open_model`.
        seed: seed for tasks that ask for sampling.
        log: file for one line of JSON per question; each process has its own (FILE, FILE.1 …).
    """

    pretrained: str | None = None
    server: str | None = None
    token: str | None = None
    token_file: str | None = None
    policy: Literal["threshold", "always", "never"] = "threshold"
    eta: float | None = None
    metric: Metric | None = None
    aggregate: Aggregate | None = None
    k: Positive | None = None
    codec: Literal["jpeg", "webp", "png"] | None = None
    view_quality: Quality | None = None
    region_quality: Quality | None = None
    max_new_tokens: Positive | None = None
    batch: Positive | None = None
    concurrency: Positive | None = None
    device: str | None = None
    dtype: str | None = None
    preset: str | None = None
    fit: Literal["stretch", "pad", "crop"] | None = None
    prompt: str | None = None
    view_px: Positive | None = None
    layer: Annotated[int, msgspec.Meta(ge=0)] | None = None
    base_px: Positive | None = None
    placement: str | None = None
    epsilon: float | None = None
    seed: int = 0
    log: str | None = None

    @property
    def model(self) -> str:
        """Name of the model to open in this process."""
        return self.pretrained or DEMO_MODEL

    @property
    def retransmit(self) -> Retransmit:
        """The policy as an option of a question."""
        return _POLICIES[self.policy]

    @property
    def picture_codec(self) -> Codec | None:
        """Codec of both views; None for that of the preset or the service."""
        return None if self.codec is None else Codec[self.codec.upper()]

    def preset_options(self) -> dict[str, Any]:
        """The given arguments of `open_model`."""
        given = {name: getattr(self, name) for name in _PRESET}
        return {name: value for name, value in given.items() if value is not None}


def settings_from(arguments: Mapping[str, Any]) -> LmmsSettings:
    """Parse lmms-eval's arguments.

    Args:
        arguments: those in `--model_args`, and `batch_size`, `max_batch_size` and `device` from
            lmms-eval's command line.

    Raises:
        ConfigError: an unknown option, an impossible value, or two options that exclude each other.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    given.pop("max_batch_size", None)
    _take_batch_size(given, str(given.pop("batch_size", 1)))
    try:
        settings = msgspec.convert(given, LmmsSettings, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(LmmsSettings.__struct_fields__)
        raise ConfigError(f"model_args: {_first_line(error)}; options: {known}") from None
    if settings.server is None:
        for name in ("token", "token_file", "concurrency"):
            if name in given:
                raise ConfigError(f"model_args: {name} is only for a service; add server=ws://…")
        return settings
    for name in _IN_PROCESS:
        if name in given:
            raise ConfigError(f"model_args: with server=…, the service sets {name}; leave it out")
    if settings.token_file is not None:
        if settings.token is not None:
            raise ConfigError("model_args: give token or token_file, not both")
        token: str | None = read_key(Path(settings.token_file), "model_args: token_file")
    else:
        token = settings.token or os.environ.get(TOKEN_VARIABLE)
    return msgspec.structs.replace(settings, token=token)


def _take_batch_size(given: dict[str, Any], batch_size: str) -> None:
    """Apply lmms-eval's `--batch_size N` (default 1) unless `batch` or `concurrency` is given."""
    if batch_size.isdecimal() and int(batch_size) > 1:
        given.setdefault("concurrency" if "server" in given else "batch", int(batch_size))


def _first_line(error: Exception) -> str:
    """msgspec's message without the `$.` of its paths."""
    return str(error).replace(" - at `$.", " for `").replace("Object contains", "there is an")
