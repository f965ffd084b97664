"""Provenance of a run: model, versions, machine, and command."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge_client.addresses import without_secrets
from eval.tasks.base import Task

FORMAT = 1

_PACKAGES = ("vlm-collab", "torch", "transformers", "numpy", "pillow", "pyarrow", "datasets")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def now() -> str:
    """The current time, in UTC, in ISO format with seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance(
    *,
    method: str,
    task: Task,
    model: dict[str, Any],
    codec: dict[str, Any],
    group: int,
    limit: int | None,
    session: str,
) -> dict[str, Any]:
    """A run's `run.json` when it begins.

    Args:
        method: name of the method.
        task: the benchmark.
        model: the method's entry on the model.
        codec: codecs of global and local views, each as [name, quality].
        group: samples that run together.
        limit: the user's limit.
        session: the same for all processes that were started together.
    """
    task_entry = {
        "name": task.name,
        "split": task.split,
        "settings": dict(task.settings),
        "scorer": task.default_scorer,
        "limit": limit,
        "samples": len(task),
    }
    return {
        "format": FORMAT,
        "method": method,
        "task": task_entry,
        "model": model,
        "codec": codec,
        "group": group,
        "versions": _versions(),
        "commit": _commit(),
        "machine": _machine(),
        "command": _command(sys.argv),
        "session": session,
        "started": now(),
        "finished": None,
        "samples": None,
        "failed": None,
    }


def difference(name: str, there: Any, here: Any) -> str:
    """Describe the first difference of two settings in a few words.

    Args:
        name: name of the setting.
        there, here: different values, as in `run.json`.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                return difference(f"{name} {key}", there.get(key), here.get(key))
    return f"{name} is {_short(there)} there and {_short(here)} here"


def weights_digest(source: str) -> str | None:
    """SHA-256 over a checkpoint's weight files, in the order of their names.

    For a single file, it equals the output of `sha256sum`.

    Args:
        source: local folder, or a name on the hub that is in the local cache.

    Returns:
        None if there are no weight files.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            return None
    digest, found = hashlib.sha256(), False
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            found = True
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest() if found else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _command(arguments: list[str]) -> list[str]:
    """A command line without secrets."""
    shown = list(arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--token="):
            shown[place] = "--token=..."
        elif argument.startswith("--server="):
            shown[place] = f"--server={without_secrets(argument.removeprefix('--server='))}"
        elif argument == "--token" and place + 1 < len(shown):
            shown[place + 1] = "..."
        elif argument == "--server" and place + 1 < len(shown):
            shown[place + 1] = without_secrets(shown[place + 1])
    return shown


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of this code's checkout; None outside of a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:  # git is not installed
        return None
    return described.stdout.strip() or None


def _machine() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
    }
