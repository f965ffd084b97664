"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from vlm_collab.cli.secret_files import TOKEN_VARIABLE, chosen_key
from vlm_collab.errors import ConfigError
from vlm_collab.protocol.messages import Options, Retransmit

ServerUrl = Annotated[
    str, typer.Option(metavar="URL", envvar="VLM_COLLAB_SERVER", help="Address of the service.")
]
Token = Annotated[
    str | None,
    typer.Option(
        envvar=TOKEN_VARIABLE,
        help="Bearer token, if the server needs one. Other users of this machine can see it on "
        "the command line; prefer --token-file or the variable.",
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File that contains only the bearer token.")
]
CaFile = Annotated[
    Path | None, typer.Option(help="PEM file of certificate authorities to trust for wss://.")
]
Deadline = Annotated[float, typer.Option(min=0.001, help="Longest time for an answer, in seconds.")]
Eta = Annotated[
    float | None,
    typer.Option(help="Uncertainty threshold for sending a region; default: the server's."),
]
Always = Annotated[
    bool,
    typer.Option(
        "--always",
        help="Send a region even if the server is sure, unless none shows more than the view.",
    ),
]
Never = Annotated[bool, typer.Option("--never", help="Never send a region.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(help="Policy file: what may leave the device (YAML, see docs/privacy.md)."),
]
CameraName = Annotated[
    str | None,
    typer.Option(
        "--camera",
        help="Camera of the policy whose rules apply; default: the policy's `default` entry.",
    ),
]
AuditFile = Annotated[
    Path | None, typer.Option(help="Audit log: a file that lists every image before it leaves.")
]


def token_of(token: str | None, token_file: Path | None) -> str | None:
    """Return the server's token, given as an option, in a file or in the environment.

    Raises:
        ConfigError: see `vlm_collab.cli.secret_files.chosen_key`.
    """
    return chosen_key(token, token_file, "--token", TOKEN_VARIABLE)


def question_options(
    *, always: bool, never: bool, eta: float | None, deadline_s: float, want_map: bool
) -> Options:
    """Make the options of all questions from the command line's.

    Raises:
        ConfigError: they contradict each other, or a value is invalid.
    """
    if always and never:
        raise ConfigError("--always and --never exclude each other")
    # Typer's `min` accepts "nan".
    if eta is not None and not 0 <= eta < math.inf:
        raise ConfigError(f"--eta must be a number of 0 or more, not {eta:g}")
    if math.isnan(deadline_s):
        raise ConfigError("--deadline must be a number of seconds, not nan")
    return Options(
        retransmit=Retransmit.ALWAYS if always else Retransmit.NEVER if never else Retransmit.AUTO,
        eta=eta,
        want_map=want_map,
    )
