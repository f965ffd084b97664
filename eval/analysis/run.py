"""Reading of runs, finished or still growing: provenance and rows."""

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
    """Sizes of a decoder: n_v, d_LLM and L.

    Eq. 17-20 of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models*
    (2025, arXiv 2512.16349) depend on them.
    """

    visual_tokens: int
    hidden_size: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        folder: the run's folder.
        provenance: contents of its `run.json`.
        records: one for each sample, ordered by index.
    """

    folder: Path
    provenance: Mapping[str, Any]
    records: Sequence[Record]

    @property
    def method(self) -> str:
        """The method: `TWO_STAGE` or `HD` of `eval.analysis.records`."""
        return str(self.provenance["method"])

    @property
    def complete(self) -> bool:
        """Whether every sample was tried; some may have failed (`failed.jsonl`)."""
        return self.provenance.get("finished") is not None

    @property
    def decoder(self) -> Decoder | None:
        """The model's sizes; None if unknown, as in a run over a service."""
        sizes = [self.provenance["model"].get(name) for name in Decoder._fields]
        return None if None in sizes else Decoder(*sizes)

    @property
    def knows_preset(self) -> bool:
        """Whether the run recorded its preset; a run over a service did not."""
        return self.provenance["model"].get("preset") is not None

    @property
    def preset(self) -> Preset:
        """The preset with which the model was used.

        Raises:
            ConfigError: the run did not record it (`knows_preset`), or it is invalid.
        """
        if not self.knows_preset:
            raise ConfigError(f"{self.folder} did not record its model's preset")
        try:
            return msgspec.convert(self.provenance["model"]["preset"], Preset)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.folder / PROVENANCE}: the model's preset: {error}") from error

    @property
    def missing(self) -> int:
        """Number of the task's samples without a row. Not meaningful for a part of a run."""
        return int(self.provenance["task"].get("samples") or 0) - len(self.records)

    @property
    def gaps(self) -> str | None:
        """One line on how many samples have no row and why; None if all have one."""
        if self.missing <= 0:
            return None
        why = "failed" if self.complete else "failed or are still to be done"
        return (
            f"{self.folder.name}: {self.missing} of {self.missing + len(self.records)} samples "
            f"have no row ({why}); all figures leave them out"
        )

    def require(self, method: str) -> None:
        """Check that the run is of this method and has samples.

        Raises:
            ConfigError: it is of another method, or has no samples.
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
    """Fields that every reader of runs needs; `eval.runs.provenance` writes more."""

    method: str
    task: _Task
    model: _Model


def open_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        ConfigError: the folder holds no run, a damaged one, or one without samples; one line.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        msgspec.convert(provenance, _Provenance)
        records = read_records(folder)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no run with samples") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder / PROVENANCE} does not describe a run: {error}") from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{folder} cannot be read as a run: {line}") from error
    return Run(folder=folder, provenance=provenance, records=records)
