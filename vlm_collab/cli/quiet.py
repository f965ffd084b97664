"""Command lines say what they have to say themselves; what libraries add is for developers.

A deprecated argument, a cache that is built for the first time, a bar for a file that is read: true
as it may be, none of it is about what a user asked for. Errors are never hidden.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Final

_VARIABLES: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""How the libraries that print with handlers of their own are told to. They read these when they
are imported, so the earlier the better; what a user has set stays."""

_NO_BARS: Final = "HF_DATASETS_DISABLE_PROGRESS_BARS"

_SPEAK: Final = (
    "vlm_collab", "edge_client", "server_plugin", "eval", "__main__", "uvicorn", "websockets",
)  # fmt: skip
"""Loggers whose warnings are for users: this package's, and those of the servers that it runs."""

_set: list[str] = []


def silence_libraries() -> None:
    """Keep the warnings of libraries off this process's terminal, and bars that nobody watches.

    For command lines, before they import anything else. `PYTHONWARNINGS`, `python -W` and the
    libraries' own variables win over it.
    """
    wanted = dict(_VARIABLES) if sys.stderr.isatty() else {**_VARIABLES, _NO_BARS: "1"}
    for name, value in wanted.items():
        if name not in os.environ:
            os.environ[name] = value
            _set.append(name)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:  # what prints where nobody has set up logs
        logging.lastResort.addFilter(is_for_users)


def restore_library_output() -> None:
    """Take `silence_libraries` back, for who asks for everything."""
    while _set:
        os.environ.pop(_set.pop(), None)
    if not sys.warnoptions:
        warnings.resetwarnings()
        warnings.simplefilter("default")
    if logging.lastResort is not None:
        logging.lastResort.removeFilter(is_for_users)


def is_for_users(record: logging.LogRecord) -> bool:
    """Whether a line of a log is for users: all of ours, and of libraries what is an error."""
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] in _SPEAK
