"""`vlm-collab chat`: talk about what a camera sees."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from edge_client.answer import EdgeAnswer
from edge_client.cameras import Camera, CameraError, CameraFrame, open_camera
from edge_client.cameras.open import SOURCES_HELP
from edge_client.cli.chat_screens import ChatScreen, JsonScreen, TerminalScreen
from edge_client.cli.errors import exit_code
from edge_client.cli.heatmap import heat_map
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
from edge_client.cli.printing import ignore_closed_output
from edge_client.cli.retrying import RetryingClient
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions
from edge_client.link.dial import DEFAULT_URL
from vlm_collab.errors import CollabError, ConfigError
from vlm_collab.geometry import Size
from vlm_collab.pictures.headers import identify
from vlm_collab.protocol.messages import Options
from vlm_collab.protocol.table import FITS

PICTURE_WAIT_S = 10.0

COMMANDS = {
    "/look": "take a new picture and forget the conversation about the old one",
    "/why": "show how sure the model was, where it looked, and what was sent",
    "/save [FILE]": "save the region that was sent",
    "/help": "show the commands",
    "/quit": "quit (or Ctrl-D); Ctrl-C cancels a question",
}


def chat(
    source: Annotated[str, typer.Argument(help=SOURCES_HELP)],
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
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Take a new picture for every question.")
    ] = False,
    single: Annotated[
        bool, typer.Option("--single", help="Ask each question without the earlier ones.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as a JSON object on one line.")
    ] = False,
) -> int:
    """Talk about a picture, or about what a camera sees.

    All questions are about the newest good picture, until /look takes another. Each line is a
    question; lines may also come from a pipe. While the server is away, questions wait.
    """
    options = question_options(
        always=always, never=never, eta=eta, deadline_s=deadline, want_map=True
    )
    screen: ChatScreen = JsonScreen() if as_json else TerminalScreen()
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the client refuses invalid UTF-8
    settings: ClientOptions = {
        "token": token_of(token, token_file),
        "ca_file": ca_file,
        "policy": policy,
        "camera": camera_name,
        "audit": audit,
    }
    code = 0
    with (
        ignore_closed_output(),
        open_camera(source, news=screen.note) as camera,
        RetryingClient(server, screen.note, forever=interactive, settings=settings) as client,
    ):
        client.connect()
        conversation = CameraChat(
            camera,
            client,
            screen,
            options=options,
            deadline_s=deadline,
            fresh=fresh,
            single=single,
        )
        code = conversation.run(screen.read if interactive else _piped)
    return code


class CameraChat:
    """One conversation.

    Args:
        camera: source of the pictures.
        client: asks the questions.
        screen: shows the answers.
        options, deadline_s: for every question.
        fresh: take a new picture for every question.
        single: ask each question without the earlier ones.
    """

    def __init__(
        self,
        camera: Camera,
        client: RetryingClient,
        screen: ChatScreen,
        *,
        options: Options,
        deadline_s: float,
        fresh: bool,
        single: bool,
    ) -> None:
        self._camera = camera
        self._client = client
        self._screen = screen
        self._options = options
        self._deadline_s = deadline_s
        self._fresh = fresh
        self._single = single
        self._frame: CameraFrame | None = None
        self._answer: EdgeAnswer | None = None
        self._turns: list[tuple[str, str]] = []
        self._failed = 0

    def run(self, read: Callable[[], str]) -> int:
        """Answer lines until the input ends.

        Args:
            read: returns the next line; raises EOFError after the last.

        Returns:
            The exit code of the first question that failed, if the lines came from a pipe.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(KeyboardInterrupt):
                self._handle("/look")
            self._screen.note("Ask about the picture; /help shows the commands.")
        while True:
            try:
                line = read().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print()  # end the unfinished line
                continue
            if line == "/quit":
                break
            try:
                if line:
                    self._handle(line)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self._screen.note("cancelled")
        return 0 if interactive else self._failed

    def _handle(self, line: str) -> None:
        try:
            self._run_line(line)
        except CollabError as error:
            self._failed = self._failed or exit_code(error)
            self._screen.fail(line, error)

    def _run_line(self, line: str) -> None:
        if not line.startswith("/"):
            self._ask(line)
            return
        command, _, rest = line.partition(" ")
        match command:
            case "/look":
                self._look()
            case "/why":
                self._why()
            case "/save":
                self._save(rest.strip())
            case "/help":
                for name, does in COMMANDS.items():
                    self._screen.note(f"{name:13} {does}")
            case _:
                raise ConfigError(f"{command} is not a command; /help lists the commands")

    def _look(self) -> CameraFrame:
        """Take the newest picture, if there is a newer one."""
        old = self._frame
        frame = self._camera.take(after=0 if old is None else old.number, wait_s=self._wait_s())
        if frame is None:
            why = self._camera.trouble or "there is no new picture"
            if old is None:
                raise CameraError(why)
            self._screen.note(f"{why}; keeping the last one")
            return old
        if self._camera.trouble is not None:
            self._screen.note(self._camera.trouble)
        self._frame, self._answer, self._turns = frame, None, []
        size = frame.picture.size
        when = datetime.fromtimestamp(frame.time_s).strftime("%H:%M:%S")
        self._screen.note(
            f"picture {frame.number}, {size.width} x {size.height} px, of {when}: "
            f"{frame.picture.name}"
        )
        return frame

    def _wait_s(self) -> float:
        """Return how long to wait for a picture, in s: a lost camera may come back."""
        still = self._frame is not None and self._camera.still
        return 0.0 if still else PICTURE_WAIT_S

    def _ask(self, question: str) -> None:
        frame = self._look() if self._fresh or self._frame is None else self._frame
        with self._screen.answering() as sink:
            answer = self._client.ask(
                frame.picture,
                question,
                history=() if self._single else self._turns,
                deadline_s=self._deadline_s,
                on_text=sink,
                options=self._options,
            )
        self._answer = answer
        self._turns.append((question, answer.text))
        self._screen.show_answer(frame, question, answer)

    def _why(self) -> None:
        answer, frame = self._answer, self._frame
        if answer is None or frame is None:
            raise ConfigError("/why: no question about this picture has been answered yet")
        welcome = self._client.welcome
        fit = None if welcome is None else FITS[welcome.fit]
        view = None if welcome is None else Size(welcome.view_width, welcome.view_height)
        self._screen.explain(frame, answer)
        if fit is not None and view is not None:
            drawn = heat_map(
                answer,
                frame.picture.size,
                fit,
                view,
                colour=self._screen.colour,
                columns=self._screen.columns,
            )
            if drawn is not None:
                self._screen.draw(drawn)

    def _save(self, name: str) -> None:
        answer = self._answer
        if answer is None or answer.region is None:
            raise ConfigError("/save: no region was sent for the last answer")
        codec = identify(answer.region)
        suffix = ".img" if codec is None else f".{codec.name.lower().replace('jpeg', 'jpg')}"
        name = name or f"region-{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
        path = Path(os.path.expanduser(name))
        given = path.suffix.lower().replace(".jpeg", ".jpg")
        if given != suffix:
            raise ConfigError(
                f"/save {path}: the region was sent as {suffix}; the name must end in {suffix}"
            )
        try:
            path.write_bytes(answer.region)
        except OSError as error:
            raise ConfigError(f"/save {path}: {error.strerror or error}") from error
        self._screen.note(f"saved as {path}, {len(answer.region)} bytes")


def _piped() -> str:
    """Read the next line of a pipe.

    Raises:
        EOFError: there are no more.
    """
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
