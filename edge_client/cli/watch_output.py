"""Output of `vlm-collab watch`: JSON lines, and progress on stderr."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from edge_client.cli.printing import printable
from vlm_collab.errors import ConfigError


class JsonLinesFile:
    """Writes JSON lines to a file or stdout, each one at once and complete.

    Args:
        path: the file, which is appended to; None for stdout.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            self._mend()
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)

    def write(self, row: dict[str, object]) -> None:
        """Write one object as a line."""
        line = msgspec.json.encode(row) + b"\n"
        if self._file is None:
            print(line.decode(), end="", flush=True)
            return
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failed(error) from error

    def _mend(self) -> None:
        """End the last line if an earlier watch was cut off in the middle of it."""
        assert self._file is not None
        if os.lseek(self._file, 0, os.SEEK_END):
            os.lseek(self._file, -1, os.SEEK_END)
            if os.read(self._file, 1) != b"\n":
                os.write(self._file, b"\n")

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(f"--out {self._path}: {error.strerror or error}")


class WatchProgress:
    """Progress of a watch on stderr; in a terminal, a line that is updated.

    Args:
        shared_terminal: stdout shows the JSON lines on the same terminal, so no line is updated.

    Attributes:
        asked, failed, skipped: counts.
        frame: number of the last frame asked about.
        latest: the last answer or error.
    """

    def __init__(self, *, shared_terminal: bool) -> None:
        self.asked = self.failed = self.skipped = self.frame = 0
        self.latest = ""
        self._console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._live: Live | None = None
        # An updated line would mix with JSON lines on the same terminal.
        if self._console.is_terminal and not shared_terminal:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                get_renderable=self._line,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if exc is None or self.asked:
            self.note(self._counts())

    def note(self, line: str) -> None:
        """Print a notice. Any thread may call this."""
        self._console.print(Text(printable(line), style="dim"))

    def update(self) -> None:
        """Show the counts as they are now."""
        if self._live is not None:
            self._live.refresh()

    def _line(self) -> Text:
        latest = printable(self.latest)
        text = Text(f"picture {self.frame}: {self._counts()}: {latest}", no_wrap=True)
        text.truncate(self._console.width, overflow="ellipsis")
        return text

    def _counts(self) -> str:
        return f"{self.asked} asked, {self.failed} failed, {self.skipped} skipped"
