"""On its first run, a command prints only our own lines, and no warnings of libraries.

Every command runs as a process with an empty home folder, where no library has a cache yet. These
tests do not depend on the warnings of today's libraries: `sitecustomize` makes every process that
imports transformers emit one warning of each kind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.support.oracle import picture
from tests.support.pinned import PROJECTS
from tests.support.process import SERVE
from vlm_collab.geometry import Size

ROOT = Path(__file__).parents[1]
PROGRAM = SERVE[0]

NOISE = """
import builtins
import logging
import sys
import warnings

_import, _warned = builtins.__import__, []


def warn():
    from transformers.utils import logging as of_transformers

    of_transformers.get_logger("transformers.models").warning("NOISE of transformers")
    warnings.warn("NOISE of a library", FutureWarning)
    logging.getLogger("matplotlib.font_manager").warning("NOISE of a logger")
    logging.getLogger("huggingface_hub.noise").warning("NOISE of the hub")


def noisy(name, *rest, **more):
    module = _import(name, *rest, **more)
    if not _warned and name == "transformers" and "torch" in sys.modules:
        _warned.append(name)
        warn()
    return module


builtins.__import__ = noisy
"""

KINDS = ("transformers", "a library", "a logger", "the hub")

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def first(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never run a command."""
    for folder in ("home", "noise", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "noise" / "sitecustomize.py").write_text(NOISE)
    dropped = ("PYTHONWARNINGS", "MPLCONFIGDIR", "XDG_", "HF_", "TRANSFORMERS_", "DATASETS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept,
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "noise", *PROJECTS))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


@pytest.fixture
def call(first: dict[str, str], tmp_path: Path) -> Call:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=first, cwd=tmp_path / "work"
        )

    return run


def test_without_our_commands_library_warnings_are_shown(call: Call) -> None:
    done = call(sys.executable, "-c", "import torch, transformers")
    for kind in KINDS:
        assert f"NOISE of {kind}" in done.stderr


def test_demo(call: Call) -> None:
    done = call(PROGRAM, "demo", "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    assert first.endswith(": what number is on the purple triangle?")
    assert last == "picture: out/demo.png    results: out/demo.json"
    assert "NOISE" not in done.stdout


@pytest.mark.slow
def test_demo_on_a_terminal(first: dict[str, str], tmp_path: Path) -> None:
    output, code = pexpect.run(
        f"{PROGRAM} demo --out out",
        env={**first, "TERM": "xterm"},  # type: ignore[arg-type]
        cwd=str(tmp_path / "work"),
        encoding="utf-8",
        timeout=600,
        withexitstatus=True,
    )
    assert code == 0
    assert "purple triangle" in output
    assert "NOISE" not in output
    assert "it/s" not in output  # a bar


def test_serve_and_ask(first: dict[str, str], call: Call, tmp_path: Path) -> None:
    picture(0, Size(320, 240)).save(tmp_path / "work" / "photo.png")
    with subprocess.Popen(
        [*SERVE, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=first,
    ) as server:
        assert server.stdout is not None
        try:
            ready = server.stdout.readline()
            found = re.fullmatch(r"vlm-collab: serving demo at (ws://\S+), .*stops\)\n", ready)
            assert found, ready
            done = call(PROGRAM, "ask", "photo.png", "what is this?", "--server", found[1])
        finally:
            server.terminate()
        rest = server.communicate()
    assert rest == ("", "")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("photo.png: what is this?\n")


def test_serve_with_log_level_debug_shows_library_warnings(first: dict[str, str]) -> None:
    with subprocess.Popen(
        [*SERVE, "--port", "0", "--log-level", "debug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=first,
    ) as server:
        assert server.stdout is not None
        try:
            server.stdout.readline()
        finally:
            server.terminate()
        _, stderr = server.communicate()
    for kind in KINDS:
        assert f"NOISE of {kind}" in stderr


def test_library_errors_are_shown(call: Call) -> None:
    code = (
        "import logging\n"
        "from vlm_collab.cli.quiet import silence_libraries\n"
        "silence_libraries()\n"
        "logging.getLogger('somebody').warning('WARNING of somebody')\n"
        "logging.getLogger('somebody').error('ERROR of somebody')\n"
        "logging.getLogger('server_plugin.engines.two_stage').warning('WARNING of ours')\n"
    )
    done = call(sys.executable, "-c", code)
    assert done.stderr == "ERROR of somebody\nWARNING of ours\n"


@pytest.mark.slow
def test_settings_of_the_user_are_kept(call: Call, first: dict[str, str]) -> None:
    first |= {"TRANSFORMERS_VERBOSITY": "warning", "PYTHONWARNINGS": "default"}
    done = call(PROGRAM, "flops", "demo")
    assert "NOISE of transformers" in done.stderr
    assert "NOISE of a library" in done.stderr
    assert "NOISE of a logger" not in done.stderr


@pytest.mark.slow
def test_flops(call: Call) -> None:
    done = call(PROGRAM, "flops", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("demo: 64 visual tokens")


def test_evaluation(call: Call) -> None:
    """Two runs (one reads files by `datasets`), a threshold, and a report."""
    run = (PROGRAM, "eval", "run", "--task", "signs", "--limit", "4", "--out")
    done = call(*run, "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run: 4 samples")
    build = ("-m", "eval.signs.build", "--out", "data", "--split", "test", "--count", "4")
    assert call(sys.executable, *build).returncode == 0
    done = call(*run, "from-files", "--data", "data")
    assert (done.returncode, done.stderr) == (0, "")
    done = call(PROGRAM, "calibrate", "run", "--max-accuracy-loss", "0.5", "--out", "found.yaml")
    (note,) = done.stderr.splitlines()
    assert note.startswith("vlm-collab calibrate: no threshold passed the test for this loss")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    done = call(PROGRAM, "eval", "report", "run", "--out", "report")
    assert (done.returncode, done.stderr) == (0, "")
