"""Read tokens and API keys from files, since all users of a machine can read its command lines."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_collab.errors import ConfigError

TOKEN_VARIABLE = "VLM_COLLAB_TOKEN"
API_KEY_VARIABLE = "VLM_COLLAB_API_KEY"

MAX_KEY_BYTES = 4096
"""A longer file was probably given by mistake."""


def chosen_key(given: str | None, file: Path | None, option: str, variable: str) -> str | None:
    """Return the token or key that the user gave: in a file, by option or in the environment.

    A file takes precedence over the environment. A file together with the option is an error.

    Args:
        given: value of the option, which defaults to the environment variable.
        file: value of the option that ends in `-file`.
        option: the option's name, for messages.
        variable: name of the environment variable.

    Raises:
        ConfigError: both were given, or the file holds no key; one line, without the key.
    """
    if file is None:
        return given
    if given is not None and given != os.environ.get(variable):
        raise ConfigError(f"{option} and {option}-file exclude each other")
    return read_key(file, f"{option}-file")


def read_key(file: Path, option: str) -> str:
    """Read a file whose only line is a key.

    Args:
        file: a file or a pipe, such as `<(pass show server)`.
        option: the option that named the file, for messages.

    Raises:
        ConfigError: the file cannot be read, or does not hold exactly one key; one line, without
            the key.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror or error}") from error
    except ValueError:  # a null byte in the name
        raise ConfigError(f"{option}: no such file") from None
    # Some editors write a byte order mark.
    key = content.removeprefix(b"\xef\xbb\xbf").strip()
    if not key:
        raise ConfigError(f"{option} {file}: the file is empty")
    if len(content) > MAX_KEY_BYTES or len(key.splitlines()) > 1:
        raise ConfigError(f"{option} {file}: the file must hold one line and nothing else")
    if not all(0x20 <= byte < 0x7F for byte in key):
        raise ConfigError(f"{option} {file}: the file must hold printable ASCII characters")
    return key.decode("ascii")
