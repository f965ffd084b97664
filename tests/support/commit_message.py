"""Check a commit message: ``python -m tests.support.commit_message FILE`` (a commit-msg hook).

The subject has at most 72 characters and does not end in a full stop. An empty line and a body
follow it. Merges and commits that a rebase will squash need no body.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.structure import SUBJECT_CHARACTERS

BODILESS = ("Merge ", "fixup! ", "squash! ", "amend! ")
"""How the subjects of commits begin that need no body."""

# Git cuts off what follows this line: the diff that `git commit --verbose` shows.
_SCISSORS = "# ------------------------ >8 ------------------------"


def faults(message: str) -> list[str]:
    """What is wrong with a message, one line for each fault."""
    written = message.partition(_SCISSORS)[0]
    lines = [line for line in written.splitlines() if not line.startswith("#")]
    subject, *body = lines or [""]
    found = []
    if not subject.strip():
        found.append("the commit has no subject")
    if len(subject) > SUBJECT_CHARACTERS:
        found.append(f"the subject has {len(subject)} characters, at most {SUBJECT_CHARACTERS}")
    if subject.endswith("."):
        found.append("the subject ends in a full stop")
    if body and body[0].strip():
        found.append("an empty line must follow the subject")
    if subject.strip() and not subject.startswith(BODILESS) and not "".join(body).strip():
        found.append("the commit has no body; say why in it")
    return found


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit("\n".join(found) if found else 0)
