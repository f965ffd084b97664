"""Lock a run's folder, so that only one session at a time works on it.

Each process holds its own lock file, named after its session. A new process checks all lock files.
The locks are the operating system's, so the lock of a killed process is free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_collab.errors import ConfigError

_LOOKING = "looking.lock"
"""Held briefly, while a process checks the other lock files."""
_LOOKING_S = 30.0


@contextmanager
def session_lock(path: Path, key: str, rank: int, session: str, *, hint: str = "") -> Iterator[str]:
    """Lock a run's folder for this process and the other processes of its session.

    Args:
        path: the folder; created if it is missing.
        key: equal in all processes of one session; it stands for the way in which they distribute
            the samples. A later session may have the same key.
        rank: number of this process among them.
        session: a unique name for this session.
        hint: appended to the message if the folder is in use.

    Yields:
        The session's name, as passed by the first of its processes that are running.

    Raises:
        ConfigError: another session uses the folder, or a process with the same key and rank; or
            the folder cannot be written or locked.
    """
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    mine, name = path / f"process-{key}-{rank}.lock", path / f"process-{key}.session"
    lock = FileLock(mine)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / _LOOKING, timeout=_LOOKING_S):
            beside = False
            for other in path.glob("process-*.lock"):
                try:
                    _drop(other)
                except Timeout:
                    if other == mine or not other.name.startswith(f"process-{key}-"):
                        raise
                    beside = True
            lock.acquire(timeout=0)
            if beside:
                session = name.read_text(encoding="utf-8")
            else:
                for old in path.glob("process-*.session"):
                    old.unlink()
                name.write_text(session, encoding="utf-8")
    except Timeout:
        raise ConfigError(f"{path}: another session is working on this run{hint}") from None
    except OSError as error:
        raise ConfigError(f"the run's folder {path}: {error.strerror or error}") from error
    except NotImplementedError as error:
        raise ConfigError(
            f"the run's folder {path}: its file system has no locks ({error})"
        ) from error
    try:
        yield session
    finally:
        # Under the common lock, since another process may be acquiring the same file.
        with suppress(Timeout, OSError), FileLock(path / _LOOKING, timeout=_LOOKING_S):
            lock.release()
            mine.unlink(missing_ok=True)
            if not any(path.glob(f"process-{key}-*.lock")):
                name.unlink(missing_ok=True)
        lock.release()


def _drop(path: Path) -> None:
    """Delete a lock file that no process holds.

    Raises:
        Timeout: a process holds it.
    """
    lock = FileLock(path)
    lock.acquire(timeout=0)
    lock.release()
    path.unlink(missing_ok=True)
