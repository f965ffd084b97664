"""Exit codes and error lines of the command line."""

from __future__ import annotations

import json
import sys

from edge_client.cli.printing import printable
from vlm_collab.errors import (
    AuthenticationError,
    CollabError,
    ConfigError,
    DeadlineError,
    ImageError,
    LinkError,
    PrivacyError,
    QuestionError,
    ServerError,
)

PROGRAM = "vlm-collab"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# By class; a subclass comes before its base class.
_EXIT_CODES: dict[type[CollabError], int] = {
    ConfigError: EXIT_USAGE,
    QuestionError: EXIT_USAGE,
    ImageError: 3,
    LinkError: 4,
    AuthenticationError: 5,
    DeadlineError: 6,
    ServerError: 7,
    PrivacyError: 8,
}

EXIT_CODES_HELP = (
    "Exit codes: 0 answered · 1 failed · 2 wrong usage · 3 picture unusable · 4 no server · "
    "5 access denied · 6 no answer in time · 7 refused by the server · 8 blocked by the policy · "
    "130 interrupted"
)


def report(line: str, code: str, *, as_json: bool) -> None:
    """Report a failure: a line on stderr, or with `--json` an object on stdout."""
    line = printable(" ".join(line.split()))
    if as_json:
        print(json.dumps({"error": line, "code": code}), flush=True)
    else:
        named = line.startswith(f"{PROGRAM} ")
        print(line if named else f"{PROGRAM}: {line}", file=sys.stderr)


def exit_code(error: CollabError) -> int:
    """Return the documented exit code of an error."""
    for kind, code in _EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return EXIT_FAILED


def error_name(error: CollabError) -> str:
    """Return an error's `code` in JSON output: the server's code, or the class name in capitals
    without "Error"."""
    if isinstance(error, ServerError):
        return error.code.name
    for kind in _EXIT_CODES:
        if isinstance(error, kind):
            return kind.__name__.removesuffix("Error").upper()
    return type(error).__name__.removesuffix("Error").upper()
