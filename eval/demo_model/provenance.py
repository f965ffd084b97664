"""Provenance of a result: command, revision, versions."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers

from eval.demo_model.export import FOLDER


def weights_digest(folder: Path = FOLDER) -> str:
    """SHA-256 of a checkpoint's weights, to identify the model of a result."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def provenance(tool: str) -> dict[str, str]:
    """Command, revision and versions of a result of ``eval.demo_model.<tool>``."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    ).stdout.strip()
    return {
        "command": " ".join(["python -m", f"eval.demo_model.{tool}", *sys.argv[1:]]),
        "git": revision or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
