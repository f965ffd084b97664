"""The commands and the code in the README work."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.process import serving

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """The lines of all shell blocks, joined where they continue, without comments."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`vlm-collab serve` as the README has it: the demo model."""
    assert "vlm-collab serve" in commands()
    with serving() as (_, ready):
        yield str(ready["url"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's `photo.jpg`."""
    shutil.copy(min((ROOT / "demo/vlm_collab_demo/pictures").glob("*.jpg")), tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_the_python_examples_run(code: str, url: str, folder: Path):
    if "ws://127.0.0.1:8765" in code:
        code = code.replace("ws://127.0.0.1:8765", url)
    else:
        assert "edge_client.ask(" in code
        code = code.replace('red circle?")', f'red circle?", server="{url}")')
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Error" not in done.stdout


def test_the_ask_command_runs(url: str, folder: Path):
    (command,) = [line for line in commands() if line.startswith("vlm-collab ask")]
    words = shlex.split(command)
    words[0] = str(BIN / words[0])
    done = subprocess.run(
        [*words, "--server", url], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "answer" in done.stdout


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (eval[\w.]+)", README))))
def test_the_modules_have_a_help_text(module: str):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_options_of_the_serve_command_exist():
    (command,) = [line for line in commands() if "--tls-cert" in line]
    help_text = subprocess.run(
        [BIN / "vlm-collab", "serve", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": ""},
        timeout=PATIENCE_S,
    ).stdout
    for option in re.findall(r"--[\w-]+", command):
        assert option in help_text


def test_the_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_has_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands():
        if line.startswith("make"):
            assert f"\n{line.split()[1]}:" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
