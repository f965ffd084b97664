"""The `vlm-collab` command.

Commands are plain functions that Typer reads. The edge's commands are listed here. Other packages
add theirs through the entry-point group `vlm_collab.commands`, so that this package imports no
server. A command is imported only when it is used, so `vlm-collab --help` is quick, and needs
no torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from edge_client.cli.errors import (
    EXIT_CODES_HELP,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    PROGRAM,
    error_name,
    exit_code,
    report,
)
from edge_client.cli.help import Command, NamedValues
from vlm_collab import __version__
from vlm_collab.cli.quiet import silence_libraries
from vlm_collab.errors import CollabError, ConfigError

GROUP = "vlm_collab.commands"

_BUILT_IN = {
    "ask": "edge_client.cli.ask:ask",
    "audit": "edge_client.cli.audit:audit",
    "chat": "edge_client.cli.chat:chat",
    "gateway": "edge_client.cli.gateway:gateway",
    "watch": "edge_client.cli.watch:watch",
}

# Help lines of commands that are not imported yet, and the extras that they need.
_HELP = {
    "ask": "Ask questions about photos.",
    "audit": "Show which images left the device.",
    "chat": "Talk about a picture, or about what a camera sees.",
    "gateway": "Serve OpenAI's API on this device, for programs that use that API.",
    "watch": "Ask the same question about a camera's pictures again and again.",
    "serve": "Serve a model.",
    "demo": "Start a server with the demo model, and ask it about high-resolution pictures.",
    "eval": "Measure models on benchmarks.",
    "calibrate": "Choose a model's threshold or layer on data.",
    "flops": "Print what a question costs on a model.",
}
_EXTRA = {
    "chat": "camera",
    "gateway": "gateway",
    "watch": "camera",
    "serve": "server",
    "demo": "demo",
    "eval": "eval",
    "calibrate": "eval",
    "flops": "server",
}
_OWN_PACKAGES = ("vlm_collab", "edge_client", "server_plugin", "eval")


class Commands(NamedValues, TyperGroup):
    """A command group that imports a command when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, those of this package first."""
        return [*_BUILT_IN, *sorted(set(_extensions()) - set(_BUILT_IN))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a stand-in with name and help text, for listings."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return TyperCommand(cmd_name, help=_HELP.get(cmd_name, "Added by another package."))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import and return the command that is to run."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if stand_in is None or name is None:
            return name, stand_in, rest
        try:
            function = _load(name)
        except ModuleNotFoundError as error:
            raise _incomplete(name, error) from error
        if isinstance(function, typer.Typer):  # a group of commands
            return name, typer.main.get_command(function), rest
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        settings = getattr(function, "context_settings", None)  # parsing options for Click
        app.command(name, cls=Command, epilog=EXIT_CODES_HELP, context_settings=settings)(function)
        return name, typer.main.get_command(app), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            # A command may import further packages while it runs.
            raise _incomplete(ctx.invoked_subcommand or "", error) from error


def main(argv: list[str] | None = None) -> None:
    """Run the command line; end the process with a documented exit code.

    Args:
        argv: arguments without the program's name; by default those of the process.
    """
    if argv is None:  # change process-wide settings only in a process of our own
        silence_libraries()
    arguments = sys.argv[1:] if argv is None else argv
    # Without handlers these loggers would print warnings; the error that follows has the cause.
    for name in ("edge_client", "websockets"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        result = typer.main.get_command(_app()).main(
            arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False
        )
        code = result if isinstance(result, int) else 0
    except CollabError as error:
        code = exit_code(error)
        report(str(error), error_name(error), as_json="--json" in arguments)
    except TyperException as error:
        code = EXIT_USAGE
        report(_usage(error), "USAGE", as_json="--json" in arguments)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
    sys.exit(code)


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=Commands,
        add_completion=False,
        pretty_exceptions_enable=False,
        epilog=EXIT_CODES_HELP,
    )
    app.callback()(_program)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Ask vision-language models about photos and send only what they need to see."""


@cache
def _extensions() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(name: str) -> Callable[..., Any]:
    if name not in _BUILT_IN:
        function: Callable[..., Any] = _extensions()[name].load()
        return function
    module, _, attribute = _BUILT_IN[name].partition(":")
    built_in: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return built_in


def _incomplete(name: str, error: ModuleNotFoundError) -> ConfigError:
    """Make the error for a command that needs a package which is not installed."""
    missing = (error.name or "").partition(".")[0]
    if missing in _OWN_PACKAGES or not missing:
        return ConfigError(f"{PROGRAM} {name} is not part of this installation ({error})")
    extra = _EXTRA.get(name)
    if extra is None:
        return ConfigError(f"{PROGRAM} {name} needs the package {missing}")
    return ConfigError(f'{PROGRAM} {name} needs more packages: pip install "{PROGRAM}[{extra}]"')


def _usage(error: TyperException) -> str:
    """Return one line about a wrong option or argument that points to `--help`."""
    context = getattr(error, "ctx", None)
    line = error.format_message().rstrip(".")
    return line if context is None else f"{line} (see {context.command_path} --help)"


if __name__ == "__main__":
    main()
