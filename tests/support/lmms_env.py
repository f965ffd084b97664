"""Build a second environment with lmms-eval, and run its command there.

lmms-eval requires a torchvision that a CPU build of torch cannot load, and many packages that
these tests do not need. So it is installed without its dependencies, plus the few packages that its
command imports; all others are those of the main environment. `.venv-lmms` takes 100 MB and half a
minute. `python -m tests.support.lmms_env` builds it, and so do the tests.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support import pinned

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-lmms"
PYTHON = FOLDER / "bin/python"
LMMS_EVAL = "lmms-eval==0.7.3"
LIGHT = ("loguru", "pytz", "tenacity", "evaluate", "sacrebleu", "aiohttp", "pytablewriter")
"""Packages that its command imports, besides torch, transformers, accelerate, datasets and their
dependencies; the list of `docs/lmms-eval.md`."""


class EnvironmentMissingError(Exception):
    """The environment cannot be built here; one line."""


def ensure() -> Path:
    """Build the environment if necessary; returns its interpreter.

    Raises:
        EnvironmentMissingError: it cannot be built here.
    """
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build()
    return PYTHON


def site_packages() -> Path:
    """Folder of its packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return FOLDER / "lib" / version / "site-packages"


def tasks() -> Path:
    """Folder of lmms-eval's own tasks."""
    return site_packages() / "lmms_eval" / "tasks"


def _build() -> None:
    # With the main environment's pip, which sees the borrowed packages and installs only the rest.
    pip = (sys.executable, "-m", "pip", "--python", str(PYTHON), "--disable-pip-version-check")
    install = (*pip, "install", "--quiet", *pinned.options("lmms.txt"))
    ready, wanted = FOLDER / ".ready", " ".join((LMMS_EVAL, *LIGHT, pinned.state("lmms.txt")))
    if not ready.exists() or ready.read_text() != wanted:
        _run(sys.executable, "-m", "venv", "--without-pip", str(FOLDER))
        _borrow()
        _run(*install, *LIGHT)
        _run(*install, "--no-deps", LMMS_EVAL)
        ready.write_text(wanted)
    _borrow()
    # Once for each state of the `pyproject.toml` files, which name the entry points.
    mark = FOLDER / ".plugin"
    if not mark.exists() or mark.stat().st_mtime < pinned.projects_changed():
        _run(*install, "--no-deps", *pinned.EDITABLE)
        mark.touch()


def _borrow() -> None:
    """Let it import all other packages from the environment of these tests."""
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    path = site_packages() / "borrowed.pth"
    if not path.exists() or path.read_text() != line:
        path.write_text(line)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentMissingError(
            f"{LMMS_EVAL}, which some tests need, cannot be installed ({reason}); leave these "
            "tests out with `make test LMMS=0`"
        )


def python(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run its interpreter.

    Args:
        arguments: the interpreter's arguments.
        home: folder for caches.
        variables: more environment variables.
    """
    return subprocess.run(
        [ensure(), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={
            **os.environ,
            # This checkout, and not another one that the plugin may be installed from.
            "PYTHONPATH": os.pathsep.join(map(str, pinned.PROJECTS)),
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        },
    )


if __name__ == "__main__":
    try:
        ensure()
    except EnvironmentMissingError as error:
        sys.exit(str(error))
