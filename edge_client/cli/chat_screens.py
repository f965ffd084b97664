"""Output of `vlm-collab chat`: text for people, or JSON lines for programs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Protocol

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from edge_client.answer import EdgeAnswer, TextSink
from edge_client.cameras import CameraFrame
from edge_client.cli import output as show
from edge_client.cli.errors import error_name, report
from edge_client.cli.printing import printable, utc_timestamp
from vlm_collab.errors import CollabError
from vlm_collab.protocol.messages import Fallback, Stage

try:
    import readline
except ImportError:  # lines are then typed without editing
    readline = None  # type: ignore[assignment]

PROMPT = "> "


class ChatScreen(Protocol):
    """Output of a conversation.

    Attributes:
        colour: it shows colours.
        columns: width of a line, in characters.
    """

    colour: bool
    columns: int

    def note(self, line: str) -> None:
        """Show a notice. Any thread may call this."""

    def fail(self, line: str, error: CollabError) -> None:
        """Show why a line could not be answered."""

    def answering(self) -> contextlib.AbstractContextManager[TextSink | None]:
        """Context while an answer is awaited; gives the sink of its growing text."""

    def show_answer(self, frame: CameraFrame, question: str, answer: EdgeAnswer) -> None:
        """Show an answer."""

    def explain(self, frame: CameraFrame, answer: EdgeAnswer) -> None:
        """Show how an answer was made."""

    def draw(self, drawn: Text) -> None:
        """Show a heat map."""

    def read(self) -> str:
        """Read a typed line.

        Raises:
            EOFError: there are no more.
        """


class TerminalScreen:
    """Text for people; in a terminal with colours and growing answers."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self.colour = self._console.is_terminal and not self._console.no_color
        self.columns = self._console.width - 2
        self._writing = threading.Lock()
        self._at_prompt = False
        self._interactive = sys.stdin.isatty()

    def note(self, line: str) -> None:
        with self._writing:
            at_prompt = self._at_prompt and self._console.is_terminal
            if at_prompt:
                print("\r\x1b[2K", end="")
            self._console.print(Text(printable(line), style="dim"))
            if at_prompt:  # restore the text typed so far
                typed = "" if readline is None else readline.get_line_buffer()
                print(PROMPT + typed, end="", flush=True)

    def fail(self, line: str, error: CollabError) -> None:
        which = "" if self._interactive or line.startswith("/") else f"{line}: "
        report(f"{which}{error}", error_name(error), as_json=False)

    @contextlib.contextmanager
    def answering(self) -> Iterator[TextSink | None]:
        if not self._console.is_terminal:
            yield None  # nobody would see the text grow, and each update costs bytes
            return
        texts: dict[Stage, str] = {}

        def growing() -> Group:
            names = {Stage.FIRST: "first answer", Stage.SECOND: "refined answer"}
            rows = [
                Text.assemble((f"  {names[stage]:14}  ", "dim"), printable(text))
                for stage, text in sorted(texts.items())
            ]
            return Group(*(rows or [Text("  …", style="dim")]))

        with Live(console=self._console, transient=True, get_renderable=growing):
            yield texts.__setitem__

    def show_answer(self, frame: CameraFrame, question: str, answer: EdgeAnswer) -> None:
        if not self._interactive:
            self._console.print(Text(printable(question), style="bold"))
        self._console.print(show.history(answer, frame.picture))

    def explain(self, frame: CameraFrame, answer: EdgeAnswer) -> None:
        first, size, box = answer.first_uncertainty, frame.picture.size, answer.box
        uncertainty = f"{first:.3f}"
        if answer.refined:
            uncertainty += f" at first, {answer.uncertainty:.3f} with the region"
        region = "none was requested: the model was sure enough"
        if answer.fallback is Fallback.NO_DETAIL:
            region = "none was requested: it would show no more than the view does"
        if box is not None:
            share = box.pixels / (size.width * size.height)
            region = (
                f"{box.width} x {box.height} px at ({box.left}, {box.top}) of "
                f"{size.width} x {size.height}, {share:.1%} of the picture"
            )
        rest = answer.bytes_up - answer.view_bytes - answer.region_bytes
        for name, value in (
            ("uncertainty", uncertainty),
            ("region", region),
            (
                "bytes sent",
                f"{answer.bytes_up}: view {answer.view_bytes}, region {answer.region_bytes}, "
                f"question and headers {rest}",
            ),
            ("bytes received", f"{answer.bytes_down}"),
        ):
            self._console.print(Text.assemble((f"  {name:14}  ", "dim"), value))

    def draw(self, drawn: Text) -> None:
        self._console.print(drawn)

    def read(self) -> str:
        self._at_prompt = True
        try:
            return input(PROMPT)
        finally:
            self._at_prompt = False


class JsonScreen:
    """One JSON object for each question on stdout; everything else on stderr."""

    colour = False
    columns = 78

    def __init__(self) -> None:
        self._stderr = Console(highlight=False, soft_wrap=True, stderr=True)

    def note(self, line: str) -> None:
        self._stderr.print(Text(printable(line), style="dim"))

    def fail(self, line: str, error: CollabError) -> None:
        # Replace invalid characters.
        line = line.encode(errors="replace").decode()
        row = {"question": line, "error": str(error), "code": error_name(error)}
        print(msgspec.json.encode(row).decode(), flush=True)

    def answering(self) -> contextlib.AbstractContextManager[TextSink | None]:
        return contextlib.nullcontext()

    def show_answer(self, frame: CameraFrame, question: str, answer: EdgeAnswer) -> None:
        row: dict[str, object] = {
            "photo": frame.picture.name,
            "question": question,
            "frame": frame.number,
            "time": utc_timestamp(frame.time_s),
        }
        row |= show.as_dict(answer, frame.picture)
        print(msgspec.json.encode(row).decode(), flush=True)

    def explain(self, frame: CameraFrame, answer: EdgeAnswer) -> None:
        """Show nothing: the answer's JSON object has all of it."""

    def draw(self, drawn: Text) -> None:
        self._stderr.print(drawn)

    def read(self) -> str:
        return input()
