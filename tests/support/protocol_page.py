"""Write the generated parts of `docs/protocol.md`: ``python -m tests.support.protocol_page``.

The transition diagram, the messages and the error codes are read from the code, so that the page
cannot drift; a test compares it with what this module would write. The picture of the diagram is
written too (`tests.support.states_picture`).
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path

import msgspec

from tests.support import states_picture
from vlm_collab.errors import ErrorCode
from vlm_collab.protocol import messages
from vlm_collab.protocol.messages import DeclineReason, Fallback, Finish
from vlm_collab.protocol.table import TRANSITIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
_MARK = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def diagram() -> str:
    """The transition table as a picture, and folded below it as a Mermaid state diagram."""
    lines = [
        f"![States of a question and the messages between them]({states_picture.PICTURE.name})",
        "",
        "<details>",
        "<summary>The same as a Mermaid diagram</summary>",
        "",
        "```mermaid",
        "stateDiagram-v2",
    ]
    for (state, message), after in TRANSITIONS.items():
        lines.append(f"    {state.name} --> {after.name}: {message.__name__}")
    return "\n".join([*lines, "```", "", "</details>"])


def fields() -> str:
    """Every message with its fields in wire order."""
    lines = ["| tag | message | direction | fields, in order |", "|---|---|---|---|"]
    unions = (("up", messages.UpMessage), ("down", messages.DownMessage))
    for way, union in unions:
        for kind in typing.get_args(union):
            names = ", ".join(f"`{name}`" for name in kind.__struct_fields__)
            tag = kind.__struct_config__.tag
            lines.append(f"| {tag} | `{kind.__name__}` | {way} | {names} |")
    for kind in (
        messages.Options,
        messages.Usage,
        messages.Turn,
        messages.MoreView,
        messages.Token,
    ):
        names = ", ".join(f"`{name}`" for name in kind.__struct_fields__)
        lines.append(f"| | `{kind.__name__}` | | {names} |")
    return "\n".join(lines)


def enumerations() -> str:
    """The closed lists, with their wire values and meanings."""
    parts = []
    for kind in (ErrorCode, Fallback, DeclineReason, Finish):
        meanings = _meanings(kind)
        parts += [f"**`{kind.__name__}`**", "", "| value | name | meaning |", "|---|---|---|"]
        parts += [f"| {m.value} | `{m.name}` | {meanings.get(m.name, '')} |" for m in kind]
        parts.append("")
    return "\n".join(parts).rstrip()


def _meanings(kind: type) -> dict[str, str]:
    """The strings under the members of an enumeration."""
    found = re.findall(r'^    (\w+) = \d+\n    """(.*?)"""', inspect.getsource(kind), re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


def page(text: str) -> str:
    """The page with its generated parts renewed."""
    parts = {"diagram": diagram, "fields": fields, "enumerations": enumerations}

    def renew(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{parts[name]()}\n<!-- end -->"

    return _MARK.sub(renew, text)


def main() -> None:
    """Command line."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    states_picture.PICTURE.write_text(states_picture.picture(), encoding="utf-8")
    print(f"wrote {PAGE} (msgspec {msgspec.__version__})", file=sys.stderr)


if __name__ == "__main__":
    main()
