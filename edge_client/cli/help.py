"""What `--help` calls the values of options: words for people instead of Python's types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_WORDS = {
    "str": "TEXT",
    "path": "PATH",
    "int": "N",
    "int range": "N",
    "float": "NUMBER",
    "float range": "NUMBER",
    "bool": "",  # a flag takes none
}


class NamedValues:
    """For commands and groups of them, before Typer's own class: options say what they take."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` included."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if param.param_type_name == "argument":
                # Its name says it already.
                param.display_type_rich = lambda ctx: ""
            elif param.metavar is None:
                kind = str(param.display_type(ctx)).strip("<>")
                kind = kind.removeprefix("list[").removesuffix("]")
                param.metavar = "" if param.is_flag else _WORDS.get(kind, kind)
        return params


class Command(NamedValues, TyperCommand):
    """A command whose help calls values by words."""
