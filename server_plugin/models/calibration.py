"""Calibration files, from `vlm-collab calibrate` for `vlm-collab serve --calibration`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import DEFAULT_FIRST_TOKENS, Aggregate, Metric, ThresholdPolicy


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a model that were chosen on data, and how they were chosen.

    Attributes:
        format: version of the file format.
        model: the model's name in the run: hub name, or a folder's last part.
        metric, aggregate, k, eta: the retransmission policy, as in a preset. Without `eta`, the
            file does not set the policy.
        layer: decoder layer whose attention is read; None for the preset's layer.
        expected: results with these settings on the data that they were chosen on.
        made: method and data of the choice; its `note` holds caveats.
    """

    format: Literal[1]
    model: str
    metric: Metric = Metric.MIN_ENTROPY
    aggregate: Aggregate = Aggregate.FULL
    k: Annotated[int, msgspec.Meta(gt=0)] = DEFAULT_FIRST_TOKENS
    eta: float | None = None
    layer: Annotated[int, msgspec.Meta(ge=0)] | None = None
    expected: dict[str, Any] = {}
    made: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.eta is not None:  # refuses a threshold that the metric cannot reach
            ThresholdPolicy(self.metric, self.aggregate, self.eta, self.k)

    def overrides(self) -> dict[str, Any]:
        """Return the settings as arguments of `open_model`."""
        overrides: dict[str, Any] = {"layer": self.layer}
        if self.eta is not None:
            overrides |= {
                "metric": self.metric.value,
                "aggregate": self.aggregate.value,
                "eta": self.eta,
                "k": self.k if self.aggregate is Aggregate.FIRST_K else None,
            }
        return {name: value for name, value in overrides.items() if value is not None}

    def require_model(self, name: str) -> None:
        """Check that a model is the calibrated one; uncertainties of different models differ.

        Raises:
            ConfigError: it is another model.
        """
        if Path(name).name != Path(self.model).name:
            raise ConfigError(f"the calibration is for {self.model}, not for {name}")


def load_calibration(path: Path) -> Calibration:
    """Read a file that `vlm-collab calibrate` wrote.

    Raises:
        ConfigError: the file is missing, or is not a calibration in YAML; one line.
    """
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"calibration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"calibration {path} is not YAML: {line}") from error
    try:
        return msgspec.convert(fields, Calibration)
    except msgspec.ValidationError as error:
        raise ConfigError(f"calibration {path}: {' '.join(str(error).split())}") from error
