"""`vlm-collab watch`: the same question, asked of a camera again and again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from edge_client.answer import EdgeAnswer
from edge_client.cameras import Camera, CameraError, CameraFrame, open_camera
from edge_client.cameras.open import SOURCES_HELP
from edge_client.cli import main as cli
from edge_client.cli import output as show
from edge_client.cli.chat import moment, reader_may_leave
from edge_client.cli.main import printable
from edge_client.cli.options import (
    Always,
    AuditFile,
    CaFile,
    CameraName,
    Deadline,
    Eta,
    Never,
    PolicyFile,
    ServerUrl,
    Token,
    TokenFile,
    token_of,
    wishes,
)
from edge_client.cli.retrying import is_passing
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions, EdgeClient
from edge_client.link.dial import DEFAULT_URL
from vlm_collab.errors import CollabError, ConfigError, LinkError, QuestionError
from vlm_collab.protocol.messages import Options

_GLANCE_S = 0.5
_SILENCE_S = 5.0
"""A camera in trouble for so long is told of in a line of its own."""


def watch(
    source: Annotated[str, typer.Argument(help=SOURCES_HELP)],
    question: Annotated[str, typer.Argument(help="What to ask of each picture.")],
    every: Annotated[
        int | None, typer.Option(min=1, help="Ask of every n-th picture that the camera delivers.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Ask every so many seconds instead.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many questions; by default never.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Append the lines to this file instead of stdout.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Play a recording at its own speed, and skip what comes too fast."
        ),
    ] = False,
    server: ServerUrl = DEFAULT_URL,
    token: Token = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    deadline: Deadline = DEFAULT_DEADLINE_S,
    eta: Eta = None,
    always: Always = False,
    never: Never = False,
    policy: PolicyFile = None,
    camera_name: CameraName = None,
    audit: AuditFile = None,
) -> int:
    """Ask the same question of a camera again and again, and write JSON lines.

    One question is under way at a time. Where the camera is faster, its pictures are skipped and
    counted. A question that fails is a line with its error, and the watch goes on. Ctrl-C and
    SIGTERM end it.
    """
    if not question.strip():
        raise QuestionError("the question is empty")
    if (every is None) == (seconds is None):
        raise ConfigError("say how often to ask: either --every N pictures or --seconds S")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds must be a number above 0, not {seconds:g}")
    options = wishes(always=always, never=never, eta=eta, deadline_s=deadline, want_map=False)
    settings: ClientOptions = {
        "token": token_of(token, token_file),
        "ca_file": ca_file,
        "policy": policy,
        "camera": camera_name,
        "audit": audit,
    }
    progress = _Progress(beside=out is None and sys.stdout.isatty())
    with (
        reader_may_leave(),
        _Lines(out) as lines,
        open_camera(source, news=progress.note, live=live) as camera,
        progress,
    ):
        watching = Watch(
            camera,
            question,
            EdgeClient(server, **settings),
            lines,
            progress,
            every=every,
            seconds=seconds,
            count=count,
            deadline_s=deadline,
            options=options,
        )
        asyncio.run(_until_told(watching))
    return 0


async def _until_told(watching: Watch) -> None:
    """Run a watch to its end, or until a signal."""
    task = asyncio.ensure_future(watching.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # not every system has them
            loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


class Watch:
    """One question, many pictures.

    Args:
        camera: where pictures come from.
        question: the text.
        client: who asks; is closed at the end.
        lines: where answers go.
        progress: is told how it goes.
        every, seconds: how often; one of them is None.
        count: how many questions; None for no end.
        deadline_s, options: for each.
    """

    def __init__(
        self,
        camera: Camera,
        question: str,
        client: EdgeClient,
        lines: _Lines,
        progress: _Progress,
        *,
        every: int | None,
        seconds: float | None,
        count: int | None,
        deadline_s: float,
        options: Options,
    ) -> None:
        self._camera = camera
        self._question = question
        self._client = client
        self._lines = lines
        self._progress = progress
        self._every = every
        self._seconds = seconds
        self._count = count
        self._deadline_s = deadline_s
        self._options = options
        self._last = 0  # number of the frame asked about last
        self._due = 1  # frame to be asked about next
        self._due_s: float | None = None  # time to ask next, by this machine or by the recording
        self._told = ""  # the camera's trouble that has its line already

    async def run(self) -> None:
        """Watch until the count is reached, a recording ends, or the task is cancelled.

        Raises:
            CollabError: the server's address, token or kind is wrong; the output is full.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._client.close)
            # Wakes the thread that waits for a frame when this task is cancelled.
            stack.callback(self._camera.close)
            try:
                await self._client.connect()
            except LinkError as error:
                if not is_passing(error):
                    raise
                self._progress.note(f"{error}; going on until it answers")
            while self._count is None or self._progress.asked < self._count:
                frame, skipped = await self._next()
                if frame is None:
                    break
                await self._ask(frame, skipped)

    async def _ask(self, frame: CameraFrame, skipped: int) -> None:
        told: dict[str, object] = {
            "source": self._camera.name,
            "frame": frame.number,
            "time": moment(frame.time_s),
        }
        if frame.position_s is not None:
            told["position_s"] = round(frame.position_s, 3)
        told |= {"skipped": skipped, "question": self._question}
        try:
            answer = await self._client.ask(
                frame.picture, self._question, deadline_s=self._deadline_s, options=self._options
            )
        except CollabError as error:
            self._write(told, error, frame)
        else:
            self._write(told, answer, frame)
        self._progress.asked += 1
        self._progress.skipped += skipped
        self._progress.frame = frame.number
        self._progress.update()

    def _write(
        self, told: dict[str, object], result: EdgeAnswer | CollabError, frame: CameraFrame | None
    ) -> None:
        if isinstance(result, CollabError):
            self._progress.failed += 1
            self._progress.said = str(result)
            told |= {"error": str(result), "code": cli.error_name(result)}
        elif frame is not None:
            self._progress.said = show.shown_text(result.text)
            told |= show.as_dict(result, frame.picture)
            del told["grid"], told["map"]  # no map was asked for
        self._lines.write(told)

    async def _next(self) -> tuple[CameraFrame | None, int]:
        """The next frame to ask about, and how many were skipped that were due before it."""
        skipped = 0
        if self._seconds is not None and not self._camera.on_demand:
            skipped = await self._until_due(self._seconds)
        frame = await self._take()
        if frame is None:
            return None, skipped
        if self._every is not None and not self._last and not self._camera.on_demand:
            self._due = frame.latest  # the count begins with the first question
        self._last = frame.number
        if self._every is not None:
            skipped = max(0, frame.latest - self._due) // self._every
            self._due += (skipped + 1) * self._every
        elif self._seconds is not None and self._due_s is not None:
            now = self._due_s if self._camera.on_demand else time.monotonic()
            late_s = now - self._due_s
            self._due_s = (now if late_s > self._seconds else self._due_s) + self._seconds
        return frame, skipped

    async def _until_due(self, seconds: float) -> int:
        """Wait until the next question is due; how many that were due went by during the last."""
        now = time.monotonic()
        if self._due_s is None:
            self._due_s = now
        skipped = max(0, int((now - self._due_s) // seconds))
        self._due_s += skipped * seconds
        await asyncio.sleep(max(0.0, self._due_s - now))
        return skipped

    async def _take(self) -> CameraFrame | None:
        """The newest frame when one is due; None when there will be no more."""
        if self._camera.on_demand and self._due_s is None:
            self._due_s = 0.0
        due = self._due if self._every is not None else 0
        while True:
            frame = await asyncio.to_thread(
                self._camera.take,
                after=self._last,
                due=due,
                due_s=(self._due_s or 0.0) if self._seconds is not None else 0.0,
                wait_s=_GLANCE_S,
            )
            if frame is not None or self._camera.ended:
                self._told = ""
                return frame
            trouble = self._camera.trouble
            if trouble is None:
                self._told = ""
            elif self._camera.lacking_s >= _SILENCE_S and not self._told:
                self._told = trouble
                self._write(
                    {
                        "source": self._camera.name,
                        "frame": None,
                        "time": moment(time.time()),
                        "skipped": 0,
                        "question": self._question,
                    },
                    CameraError(self._told),
                    None,
                )


class _Lines:
    """JSON lines, each written at once and whole.

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

    def write(self, told: dict[str, object]) -> None:
        """Write one object."""
        line = msgspec.json.encode(told) + b"\n"
        if self._file is None:
            print(line.decode(), end="", flush=True)
            return
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failed(error) from error

    def _mend(self) -> None:
        """End the last line of an earlier watch that lost its power in the middle of it."""
        assert self._file is not None
        if os.lseek(self._file, 0, os.SEEK_END):
            os.lseek(self._file, -1, os.SEEK_END)
            if os.read(self._file, 1) != b"\n":
                os.write(self._file, b"\n")

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(f"--out {self._path}: {error.strerror or error}")


class _Progress:
    """How a watch goes, on stderr: a line that changes where somebody can see it.

    Attributes:
        asked, failed, skipped: counts.
        frame: number of the last one asked about.
        said: the last answer, or why there is none.
    """

    def __init__(self, *, beside: bool) -> None:
        self.asked = self.failed = self.skipped = self.frame = 0
        self.said = ""
        self._console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._live: Live | None = None
        # Not where the lines themselves go by.
        if self._console.is_terminal and not beside:
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
        """Tell something; any thread may."""
        self._console.print(Text(printable(line), style="dim"))

    def update(self) -> None:
        """Show the counts as they are now."""
        if self._live is not None:
            self._live.refresh()

    def _line(self) -> Text:
        said = printable(self.said)
        text = Text(f"picture {self.frame}: {self._counts()}: {said}", no_wrap=True)
        text.truncate(self._console.width, overflow="ellipsis")
        return text

    def _counts(self) -> str:
        return f"{self.asked} asked, {self.failed} failed, {self.skipped} skipped"
