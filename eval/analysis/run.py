"""A finished or growing run, as everything that reads runs takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eval.analysis.records import PROVENANCE, Record, read_records
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError


class Decoder(NamedTuple):
    """What Eq. 17-20 of 003_92b41fe49395ce1a.txt depend on: n_v, d_LLM and L."""

    visual_tokens: int
    hidden_size: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        folder: where it lies.
        provenance: its `run.json`.
        records: one for each sample, by its index.
    """

    folder: Path
    provenance: Mapping[str, Any]
    records: Sequence[Record]

    @property
    def method(self) -> str:
        """What was run: `TWO_STAGE`, `HD`."""
        return str(self.provenance["method"])

    @property
    def complete(self) -> bool:
        """Whether every sample was worked on; some may have failed (`failed.jsonl`)."""
        return self.provenance.get("finished") is not None

    @property
    def decoder(self) -> Decoder | None:
        """The model's sizes; None where the run does not know them, as over a service."""
        sizes = [self.provenance["model"].get(name) for name in Decoder._fields]
        return None if None in sizes else Decoder(*sizes)

    @property
    def knows_preset(self) -> bool:
        """Whether `preset` can be had; over a service it cannot."""
        return self.provenance["model"].get("preset") is not None

    @property
    def preset(self) -> Preset:
        """How the model was used.

        Raises:
            ConfigError: the run does not know it, as one over a service, or it is none.
        """
        if not self.knows_preset:
            raise ConfigError(f"{self.folder} does not know its model's preset")
        try:
            return msgspec.convert(self.provenance["model"]["preset"], Preset)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.folder / PROVENANCE}: the model's preset: {error}") from error

    @property
    def missing(self) -> int:
        """Samples of the task that gave no row. Of a whole run, not of a part of its rows."""
        return int(self.provenance["task"].get("samples") or 0) - len(self.records)

    @property
    def gaps(self) -> str | None:
        """One line that says of how many samples there is no row and why; None if of none."""
        if self.missing <= 0:
            return None
        why = "failed" if self.complete else "failed or are still to be done"
        return (
            f"{self.folder.name}: {self.missing} of {self.missing + len(self.records)} samples "
            f"gave no row ({why}); all figures leave them out"
        )

    def require(self, method: str) -> None:
        """Refuse a run that is no run of a method.

        Raises:
            ConfigError: it is of another one, or holds no samples.
        """
        if self.method != method:
            raise ConfigError(f"{self.folder} is a run of {self.method}, not of {method}")
        if not self.records:
            raise ConfigError(f"{self.folder} holds no samples")


class _Task(msgspec.Struct):
    name: str
    split: str
    scorer: str


class _Model(msgspec.Struct):
    name: str


class _Provenance(msgspec.Struct):
    """What no reader of runs can do without; there is more (`eval.runs.provenance`)."""

    method: str
    task: _Task
    model: _Model


def open_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        ConfigError: there is none, it is damaged, or it has no samples yet; one line.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        msgspec.convert(provenance, _Provenance)
        records = read_records(folder)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no run with samples") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder / PROVENANCE} is of no run: {error}") from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{folder} cannot be read as a run: {line}") from error
    return Run(folder=folder, provenance=provenance, records=records)
