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
def session_lock(path: Path, key: str, rank: int, session: str, *, hint: str = "") -> Iterator[str]:
    """Holds a run's folder for a process and others of its session; a killed one lets go.

    Args:
        path: the folder; made if it is missing.
        key: the same for all processes that share the run out, in the same way. Later ones may
            have the same.
        rank: number of this process among them.
        session: a name that no later one has.
        hint: what else to say to who is refused.

    Yields:
        The session's name: what the first of those had that are at work together.

    Raises:
        ConfigError: another session has it, or this process of this one; or it cannot be written
            or locked.
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
        raise ConfigError(f"{path}: another session is at work on this run{hint}") from None
    except OSError as error:
        raise ConfigError(f"the run's folder {path}: {error.strerror or error}") from error
    except NotImplementedError as error:
        raise ConfigError(
            f"the run's folder {path}: its file system has no locks ({error})"
        ) from error
    try:
        yield session
    finally:
        # Not deleted while another process of this session may be taking it anew.
        with suppress(Timeout, OSError), FileLock(path / _LOOKING, timeout=_LOOKING_S):
            lock.release()
            mine.unlink(missing_ok=True)
            if not any(path.glob(f"process-{key}-*.lock")):
                name.unlink(missing_ok=True)
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
