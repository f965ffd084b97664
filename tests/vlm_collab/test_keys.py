"""Tokens and API keys from files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlm_collab.cli.secret_files import MAX_KEY_BYTES, chosen_key, read_key
from vlm_collab.errors import ConfigError


@pytest.mark.parametrize(
    "content", [b"s3cret", b"s3cret\n", b" s3cret\r\n", b"\xef\xbb\xbfs3cret\n"]
)
def test_a_key_is_read_without_white_space_and_byte_order_mark(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    assert read_key(file, "--token-file") == "s3cret"


def test_a_key_may_come_through_a_pipe() -> None:
    read, write = os.pipe()
    os.write(write, b"s3cret\n")
    os.close(write)
    try:
        assert read_key(Path(f"/dev/fd/{read}"), "--token-file") == "s3cret"
    finally:
        os.close(read)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"s3cret\nmore", "one line"),
        (b"s3cret" * MAX_KEY_BYTES, "one line"),
        ("s3crét".encode(), "ASCII"),
        (b"s3cret\0", "ASCII"),
        (None, "No such file"),
    ],
)
def test_an_invalid_key_file_is_an_error_of_one_line_without_the_key(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_key(file, "--token-file")
    line = str(caught.value)
    assert line.startswith("--token-file ")
    assert "s3cr" not in line
    assert "\n" not in line


def test_a_file_overrides_the_environment_and_excludes_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("of the file")
    monkeypatch.delenv("KEY", raising=False)
    assert chosen_key(None, None, "--token", "KEY") is None
    assert chosen_key("given", None, "--token", "KEY") == "given"
    assert chosen_key(None, file, "--token", "KEY") == "of the file"
    with pytest.raises(ConfigError, match="exclude each other"):
        chosen_key("given", file, "--token", "KEY")
    monkeypatch.setenv("KEY", "of the environment")
    assert chosen_key("of the environment", file, "--token", "KEY") == "of the file"
