"""Programs as processes of their own, `vlm-collab serve` among them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = (str(Path(sys.executable).with_name("vlm-collab")), "serve")


def run(*command: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; fail unless it has this exit code."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
    return done


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """Start a server; yield its process and its ready line."""
    process = subprocess.Popen(
        [*SERVE, "--port", "0", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
