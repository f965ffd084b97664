"""Options of `pip install` for the environments that tests build (see `versions`)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = (ROOT, ROOT / "demo")
"""Folders of this repository's distributions, `vlm-collab` and `vlm-collab-demo`."""
EDITABLE = tuple(part for folder in PROJECTS for part in ("--editable", str(folder)))
"""Arguments of `pip install` that install both from this checkout."""


def projects_changed() -> float:
    """When the newer of their `pyproject.toml` files changed, in seconds since the epoch."""
    return max((folder / "pyproject.toml").stat().st_mtime for folder in PROJECTS)


def folder() -> Path | None:
    """Folder of the constraints files; None for the newest versions (`make … CONSTRAINTS=`)."""
    wanted = os.environ.get("CONSTRAINTS")
    if wanted == "":
        return None
    return ROOT / (wanted or "constraints")


def options(name: str) -> tuple[str, ...]:
    """Arguments of `pip install` that apply a constraints file, also to build requirements."""
    if (where := folder()) is None:
        return ()
    return ("--constraint", str(where / name), "--build-constraint", str(where / name))


def state(name: str) -> str:
    """Digest of a constraints file; an environment is built again when it changes."""
    where = folder()
    text = b"" if where is None else (where / name).read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]
