"""Silence the warnings and progress bars of libraries in command lines.

Deprecated arguments, first-time cache builds and file-reading bars concern developers, not users.
Errors are never hidden.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Final

_LOG_LEVELS: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""Log levels of the libraries that have log handlers of their own. They read these variables at
import, so they are set early. A value that the user has set is kept."""

_NO_BARS: Final = "HF_DATASETS_DISABLE_PROGRESS_BARS"

_USER_LOGGERS: Final = (
    "vlm_collab", "edge_client", "server_plugin", "eval", "__main__", "uvicorn", "websockets",
)  # fmt: skip
"""Loggers whose warnings are meant for users: our packages', and those of the servers we run."""

_set_variables: list[str] = []


def silence_libraries() -> None:
    """Silence library warnings in this process, and progress bars if stderr is not a terminal.

    Call it in a command line before other imports. `PYTHONWARNINGS`, `python -W` and the
    libraries' own variables take precedence.
    """
    variables = dict(_LOG_LEVELS) if sys.stderr.isatty() else {**_LOG_LEVELS, _NO_BARS: "1"}
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            _set_variables.append(name)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:  # the handler in use when logging is not configured
        logging.lastResort.addFilter(is_for_users)


def restore_library_output() -> None:
    """Undo `silence_libraries`, for users who ask for all output."""
    while _set_variables:
        os.environ.pop(_set_variables.pop(), None)
    if not sys.warnoptions:
        warnings.resetwarnings()
        warnings.simplefilter("default")
    if logging.lastResort is not None:
        logging.lastResort.removeFilter(is_for_users)


def is_for_users(record: logging.LogRecord) -> bool:
    """Whether a log record is for users: every record of ours, and errors of libraries."""
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] in _USER_LOGGERS
