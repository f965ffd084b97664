"""`vlm-collab eval`: a group of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from edge_client.cli.help import Command, NamedValues

_COMMANDS = {
    "run": ("eval.cli.run", "Answer a benchmark's questions with both stages, and keep all data."),
    "sweep": ("eval.cli.report", "Compute all trade-off curves of a run, without the model."),
    "report": ("eval.cli.report", "Make figures and tables from runs, with their provenance."),
}


class EvalCommands(NamedValues, TyperGroup):
    """Commands by name. A command is the function of the same name in its module."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands that are installed."""
        return [name for name, (module, _) in _COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A placeholder with name and help text, for listings."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return TyperCommand(cmd_name, help=_COMMANDS[cmd_name][1])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is called."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if stand_in is None or name is None:
            return name, stand_in, rest
        function = getattr(importlib.import_module(_COMMANDS[name][0]), name)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name, cls=Command)(function)
        return name, typer.main.get_command(app), rest


app = typer.Typer(
    cls=EvalCommands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure models on benchmarks, and make curves, figures and tables.",
)


@app.callback()
def _group() -> None:
    """Measure models on benchmarks, and make curves, figures and tables."""
