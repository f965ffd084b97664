"""One session at a time works on a run's folder.

Each process holds a lock of its own, whose name says of which session it is; whoever begins looks
at all of them. A lock is the operating system's, so one whose process was killed is free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_collab.errors import ConfigError

_LOOKING = "looking.lock"
"""Held while the others are looked at, and never for long."""
_LOOKING_S = 30.0


@contextmanager
def at_work(path: Path, session: str, rank: int) -> Iterator[None]:
    """Holds a run's folder for a process and others of its session; a killed one lets go.

    Args:
        path: the folder; made if it is missing.
        session: the same for all processes that share the run out, in the same way.
        rank: number of this process among them.

    Raises:
        ConfigError: another session has it, or this process of this one; or it cannot be written.
    """
    key = hashlib.sha256(session.encode()).hexdigest()[:12]
    mine = path / f"process-{key}-{rank}.lock"
    lock = FileLock(mine)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / _LOOKING, timeout=_LOOKING_S):
            for other in path.glob("process-*.lock"):
                if other == mine or not other.name.startswith(f"process-{key}-"):
                    _drop(other)
            lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{path}: another session is at work on this run") from None
    except OSError as error:
        raise ConfigError(f"the run's folder {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        # Not deleted while another process of this session may be taking it anew.
        with suppress(Timeout, OSError), FileLock(path / _LOOKING, timeout=_LOOKING_S):
            lock.release()
            mine.unlink(missing_ok=True)
        lock.release()


def _drop(path: Path) -> None:
    """Delete a lock that nobody holds.

    Raises:
        Timeout: somebody does.
    """
    lock = FileLock(path)
    lock.acquire(timeout=0)
    lock.release()
    path.unlink(missing_ok=True)
