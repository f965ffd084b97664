"""Show plain words for option values in `--help` instead of Python's types."""

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
    "bool": "",  # a flag takes no value
}


class NamedValues:
    """Mixin before Typer's command or group class: names the values of options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, including `--help`."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if param.param_type_name == "argument":
                # An argument's name is enough.
                param.display_type_rich = lambda ctx: ""
            elif param.metavar is None:
                kind = str(param.display_type(ctx)).strip("<>")
                kind = kind.removeprefix("list[").removesuffix("]")
                param.metavar = "" if param.is_flag else _WORDS.get(kind, kind)
        return params


class Command(NamedValues, TyperCommand):
    """A command whose help names option values in plain words."""
