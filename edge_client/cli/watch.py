"""`vlm-collab watch`: ask the same question about a camera's pictures again and again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from edge_client.answer import EdgeAnswer
from edge_client.cameras import Camera, CameraError, CameraFrame, open_camera
from edge_client.cameras.open import SOURCES_HELP
from edge_client.cli import output as show
from edge_client.cli.errors import error_name
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
    question_options,
    token_of,
)
from edge_client.cli.printing import ignore_closed_output, utc_timestamp
from edge_client.cli.retrying import is_transient
from edge_client.cli.watch_output import JsonLinesFile, WatchProgress
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions, EdgeClient
from edge_client.link.dial import DEFAULT_URL
from vlm_collab.errors import CollabError, ConfigError, LinkError, QuestionError
from vlm_collab.protocol.messages import Options

_TAKE_WAIT_S = 0.5
_SILENCE_S = 5.0
"""A camera in trouble for this time gets an output line of its own."""


def watch(
    source: Annotated[str, typer.Argument(help=SOURCES_HELP)],
    question: Annotated[str, typer.Argument(help="The question to ask about each picture.")],
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Ask about every N-th picture of the camera; or give --seconds."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Ask once in this many seconds; or give --every.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after this many questions; default: no end.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Append the JSON lines to this file instead of writing them to stdout."),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Play a recording at its own speed, and skip pictures that come too fast.",
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
    """Ask the same question about a camera's pictures again and again, and write JSON lines.

    One question runs at a time. If the camera is faster, pictures are skipped and counted. A
    failed question gives a line with its error, and the watch continues. Ctrl-C and SIGTERM end it.
    """
    if not question.strip():
        raise QuestionError("the question is empty")
    if (every is None) == (seconds is None):
        raise ConfigError(
            "give either --every N (pictures) or --seconds S, to say how often to ask"
        )
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds must be a number above 0, not {seconds:g}")
    options = question_options(
        always=always, never=never, eta=eta, deadline_s=deadline, want_map=False
    )
    settings: ClientOptions = {
        "token": token_of(token, token_file),
        "ca_file": ca_file,
        "policy": policy,
        "camera": camera_name,
        "audit": audit,
    }
    progress = WatchProgress(shared_terminal=out is None and sys.stdout.isatty())
    with (
        ignore_closed_output(),
        JsonLinesFile(out) as lines,
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
        asyncio.run(_run_until_signal(watching))
    return 0


async def _run_until_signal(watching: Watch) -> None:
    """Run a watch to its end, or until SIGINT or SIGTERM."""
    task = asyncio.ensure_future(watching.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # not available on every system
            loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


class Watch:
    """One question about many pictures.

    Args:
        camera: source of the pictures.
        question: the text.
        client: asks the questions; it is closed at the end.
        lines: receives the answers.
        progress: shows the counts.
        every, seconds: interval in pictures or in s; one of them is None.
        count: number of questions; None for no end.
        deadline_s, options: for each question.
    """

    def __init__(
        self,
        camera: Camera,
        question: str,
        client: EdgeClient,
        lines: JsonLinesFile,
        progress: WatchProgress,
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
        self._last = 0  # number of the last frame asked about
        self._due = 1  # number of the next frame to ask about
        self._due_s: float | None = None  # when to ask next: monotonic, or recording position
        self._reported = ""  # the camera's trouble for which a line was written

    async def run(self) -> None:
        """Watch until the count is reached, a recording ends, or the task is cancelled.

        Raises:
            CollabError: the server's address or token is wrong, it is not a vlm-collab server, or
                the output cannot be written.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._client.close)
            # On cancellation, this wakes the thread that waits for a frame.
            stack.callback(self._camera.close)
            try:
                await self._client.connect()
            except LinkError as error:
                if not is_transient(error):
                    raise
                self._progress.note(f"{error}; trying again until it answers")
            while self._count is None or self._progress.asked < self._count:
                frame, skipped = await self._next()
                if frame is None:
                    break
                await self._ask(frame, skipped)

    async def _ask(self, frame: CameraFrame, skipped: int) -> None:
        row: dict[str, object] = {
            "source": self._camera.name,
            "frame": frame.number,
            "time": utc_timestamp(frame.time_s),
        }
        if frame.position_s is not None:
            row["position_s"] = round(frame.position_s, 3)
        row |= {"skipped": skipped, "question": self._question}
        try:
            answer = await self._client.ask(
                frame.picture, self._question, deadline_s=self._deadline_s, options=self._options
            )
        except CollabError as error:
            self._write(row, error, frame)
        else:
            self._write(row, answer, frame)
        self._progress.asked += 1
        self._progress.skipped += skipped
        self._progress.frame = frame.number
        self._progress.update()

    def _write(
        self, row: dict[str, object], result: EdgeAnswer | CollabError, frame: CameraFrame | None
    ) -> None:
        if isinstance(result, CollabError):
            self._progress.failed += 1
            self._progress.latest = str(result)
            row |= {"error": str(result), "code": error_name(result)}
        elif frame is not None:
            self._progress.latest = show.shown_text(result.text)
            row |= show.as_dict(result, frame.picture)
            del row["grid"], row["map"]  # no map was asked for
        self._lines.write(row)

    async def _next(self) -> tuple[CameraFrame | None, int]:
        """Return the next frame to ask about, and the number of due frames skipped before it."""
        skipped = 0
        if self._seconds is not None and not self._camera.on_demand:
            skipped = await self._until_due(self._seconds)
        frame = await self._take()
        if frame is None:
            return None, skipped
        if self._every is not None and not self._last and not self._camera.on_demand:
            self._due = frame.latest  # start counting at the first question
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
        """Wait until the next question is due; return how many were missed during the last."""
        now = time.monotonic()
        if self._due_s is None:
            self._due_s = now
        skipped = max(0, int((now - self._due_s) // seconds))
        self._due_s += skipped * seconds
        await asyncio.sleep(max(0.0, self._due_s - now))
        return skipped

    async def _take(self) -> CameraFrame | None:
        """Return the newest frame when one is due; None if there will be no more."""
        if self._camera.on_demand and self._due_s is None:
            self._due_s = 0.0
        due = self._due if self._every is not None else 0
        while True:
            frame = await asyncio.to_thread(
                self._camera.take,
                after=self._last,
                due=due,
                due_s=(self._due_s or 0.0) if self._seconds is not None else 0.0,
                wait_s=_TAKE_WAIT_S,
            )
            if frame is not None or self._camera.ended:
                self._reported = ""
                return frame
            trouble = self._camera.trouble
            if trouble is None:
                self._reported = ""
            elif self._camera.without_picture_s >= _SILENCE_S and not self._reported:
                self._reported = trouble
                self._write(
                    {
                        "source": self._camera.name,
                        "frame": None,
                        "time": utc_timestamp(time.time()),
                        "skipped": 0,
                        "question": self._question,
                    },
                    CameraError(self._reported),
                    None,
                )
