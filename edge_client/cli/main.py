"""The `vlm-collab` command.

Commands are plain functions that Typer reads. `ask` is here; others come from the entry-point
group `vlm_collab.commands`, so that this package imports no server. None is imported before it
is used: `vlm-collab --help` stays quick where torch is installed and works where it is not.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from edge_client.cli.help import Command, NamedValues
from vlm_collab import __version__
from vlm_collab.cli.quiet import hush
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
GROUP = "vlm_collab.commands"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# By base class; a more special one stands before the one it derives from.
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
    "Exit codes: 0 answered · 1 failed · 2 wrong use · 3 picture unusable · 4 no server · "
    "5 not let in · 6 no answer in time · 7 refused by the server · 8 kept back by the policy · "
    "130 interrupted"
)

_BUILT_IN = {
    "ask": "edge_client.cli.ask:ask",
    "audit": "edge_client.cli.audit:audit",
    "chat": "edge_client.cli.chat:chat",
    "gateway": "edge_client.cli.gateway:gateway",
    "watch": "edge_client.cli.watch:watch",
}

# What `--help` says of commands without importing them, and which extra they need.
_HELP = {
    "ask": "Ask questions about photos.",
    "audit": "Show which images left the device.",
    "chat": "Talk about what a camera sees, or a picture.",
    "gateway": "Speak OpenAI's API on this device, for clients that know no other.",
    "watch": "Ask the same question of a camera again and again.",
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
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, those of this package first."""
        return [*_BUILT_IN, *sorted(set(_extensions()) - set(_BUILT_IN))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with name and help text; enough for listings."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return TyperCommand(cmd_name, help=_HELP.get(cmd_name, "Added by another package."))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself, for running it."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if stand_in is None or name is None:
            return name, stand_in, rest
        try:
            function = _load(name)
        except ModuleNotFoundError as error:
            raise _incomplete(name, error) from error
        if isinstance(function, typer.Typer):  # a group with commands of its own
            return name, typer.main.get_command(function), rest
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        settings = getattr(function, "context_settings", None)  # how it wants its line read
        app.command(name, cls=Command, epilog=EXIT_CODES_HELP, context_settings=settings)(function)
        return name, typer.main.get_command(app), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            # A command may import what it needs when it runs.
            raise _incomplete(ctx.invoked_subcommand or "", error) from error


def main(argv: list[str] | None = None) -> None:
    """Run the command line; ends the process with one of the documented exit codes.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    if argv is None:  # only a process that is all ours is set up as a whole
        hush()
    arguments = sys.argv[1:] if argv is None else argv
    # What these would log is told once, as the error that it leads to.
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


def report(line: str, code: str, *, as_json: bool) -> None:
    """Tell a failure: a line on stderr, or with `--json` an object on stdout."""
    line = printable(" ".join(line.split()))
    if as_json:
        print(json.dumps({"error": line, "code": code}), flush=True)
    else:
        named = line.startswith(f"{PROGRAM} ")
        print(line if named else f"{PROGRAM}: {line}", file=sys.stderr)


def printable(text: str) -> str:
    """Text without what would move the cursor or change the terminal: it comes from outside."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def exit_code(error: CollabError) -> int:
    """The documented exit code for an error."""
    for kind, code in _EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return EXIT_FAILED


def error_name(error: CollabError) -> str:
    """What `--json` calls an error: the server's code, or the class without its ending."""
    if isinstance(error, ServerError):
        return error.code.name
    for kind in _EXIT_CODES:
        if isinstance(error, kind):
            return kind.__name__.removesuffix("Error").upper()
    return type(error).__name__.removesuffix("Error").upper()


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
    """One line for a command whose packages are not all installed."""
    missing = (error.name or "").partition(".")[0]
    if missing in _OWN_PACKAGES or not missing:
        return ConfigError(f"{PROGRAM} {name} is not part of this installation ({error})")
    extra = _EXTRA.get(name)
    if extra is None:
        return ConfigError(f"{PROGRAM} {name} needs the package {missing}")
    return ConfigError(f'{PROGRAM} {name} needs more packages: pip install "{PROGRAM}[{extra}]"')


def _usage(error: TyperException) -> str:
    """One line for a wrong option or argument, and where to read about the right ones."""
    context = getattr(error, "ctx", None)
    line = error.format_message().rstrip(".")
    return line if context is None else f"{line} (see {context.command_path} --help)"


if __name__ == "__main__":
    main()
