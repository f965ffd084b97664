"""The distributions of this repository, built as they are published."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.process import run

ROOT = Path(__file__).resolve().parents[2]


def _built(project: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(project))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of vlm-collab."""
    return _built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of vlm-collab-demo."""
    return _built(ROOT / "demo", tmp_path_factory.mktemp("demo_wheel"))
