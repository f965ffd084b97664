"""Tokens and API keys from files: on a command line, every user of the machine can read them."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_collab.errors import ConfigError

TOKEN_VARIABLE = "VLM_COLLAB_TOKEN"
API_KEY_VARIABLE = "VLM_COLLAB_API_KEY"

MAX_KEY_BYTES = 4096
"""A longer file is some other one, given by mistake."""


def chosen_key(given: str | None, file: Path | None, option: str, variable: str) -> str | None:
    """The token or key that a user gave: in a file, as an option, or in the environment.

    A file stands before the environment; beside the option it is a mistake.

    Args:
        given: of the option, which takes the environment's where it is not given.
        file: of the option's twin that ends in `-file`.
        option: the option's name, for messages.
        variable: the environment's name for it.

    Raises:
        ConfigError: both were given, or the file holds no key; one line, without the key.
    """
    if file is None:
        return given
    if given is not None and given != os.environ.get(variable):
        raise ConfigError(f"{option} and {option}-file exclude each other")
    return read_key(file, f"{option}-file")


def read_key(file: Path, option: str) -> str:
    """The key that a file holds, alone on its only line.

    Args:
        file: a pipe will do as well (`<(pass show server)`).
        option: that named it, for messages.

    Raises:
        ConfigError: it cannot be read, or holds none or more than a key; one line, without it.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror or error}") from error
    except ValueError:  # a null byte in the name
        raise ConfigError(f"{option}: no such file") from None
    # Editors of some systems put a mark before the text.
    key = content.removeprefix(b"\xef\xbb\xbf").strip()
    if not key:
        raise ConfigError(f"{option} {file}: the file is empty")
    if len(content) > MAX_KEY_BYTES or len(key.splitlines()) > 1:
        raise ConfigError(f"{option} {file}: the file must hold one line and nothing else")
    if not all(0x20 <= byte < 0x7F for byte in key):
        raise ConfigError(f"{option} {file}: the file must hold printable ASCII characters")
    return key.decode("ascii")
