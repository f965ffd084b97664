"""Show answers: as text with Rich for people, as JSON lines for programs."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import msgspec
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_client.answer import EdgeAnswer, TextSink
from edge_client.cli.errors import error_name, report
from edge_client.cli.printing import printable
from edge_client.picture import Picture
from vlm_collab.errors import CollabError
from vlm_collab.protocol.messages import DeclineReason, Fallback, Stage

_FALLBACK_REASONS = {
    Fallback.DECLINED: "the region was not sent",
    Fallback.DEADLINE: "the refined answer did not come in time",
    Fallback.BAD_REGION: "the server could not use the region",
    Fallback.OVERLOAD: "the server had no room for a second pass",
    Fallback.SERVER_FAILED: "the server failed in the second pass",
    Fallback.LINK_LOST: "the connection was lost",
    Fallback.NO_DETAIL: "no region would show more than the view does",
}

_DECLINE_REASONS = {
    DeclineReason.LIMIT: "it is over a limit",
    DeclineReason.PRIVACY: "the policy does not allow it",
    DeclineReason.GONE: "the original is gone",
    DeclineReason.BAD_REQUEST: "the request is invalid",
    DeclineReason.FAILED: "cutting it failed",
}

NO_TEXT = "(no text)"
"""Shown for an answer that is empty or blank."""

_SHADES = "·░▒▓█"
_LIVE_LINES = 10


class Screen(Protocol):
    """Output of `vlm-collab ask`."""

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""

    def sink(self, number: int, picture: Picture, question: str) -> TextSink | None:
        """Return the sink for a question's growing text; None if it is not needed."""

    def show(
        self, number: int, picture: Picture, question: str, result: EdgeAnswer | CollabError
    ) -> None:
        """Show a result."""

    def note(self, line: str) -> None:
        """Show a notice."""


class JsonLines:
    """One JSON object per line; a failed question has `error` and `code` instead of an answer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sink(self, number: int, picture: Picture, question: str) -> TextSink | None:
        """Return None: programs do not read half an answer, and each update would cost bytes."""
        return None

    def show(
        self, number: int, picture: Picture, question: str, result: EdgeAnswer | CollabError
    ) -> None:
        """Print the object."""
        row: dict[str, object] = {"photo": picture.name, "question": question}
        if isinstance(result, CollabError):
            row |= {"error": str(result), "code": error_name(result)}
        else:
            row |= as_dict(result, picture)
        # msgspec writes NaN and infinity, which JSON lacks, as null.
        print(msgspec.json.encode(row).decode(), flush=True)

    def note(self, line: str) -> None:
        """Show nothing: stdout is for answers only."""


class Terminal:
    """Text for people; in a terminal with colours and growing answers.

    Args:
        show_map: show where the model looked.
        several: there are several questions, so an error line must name its question.
    """

    def __init__(self, *, show_map: bool, several: bool = False) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._show_map = show_map
        self._several = several
        self._texts: dict[int, Text] = {}
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, get_renderable=self._growing)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def sink(self, number: int, picture: Picture, question: str) -> TextSink | None:
        """Return a sink that shows the growing text in a terminal; None without a terminal."""
        if self._live is None:
            return None

        def take(stage: Stage, text: str) -> None:
            line = Text("… ", style="dim")
            line.append(printable(question), style="bold")
            line.append("  " + ("looking closer: " if stage is Stage.SECOND else ""))
            line.append(printable(text))
            self._texts[number] = line

        return take

    def show(
        self, number: int, picture: Picture, question: str, result: EdgeAnswer | CollabError
    ) -> None:
        """Print an answer with its history and cost, or an error as a line on stderr."""
        self._texts.pop(number, None)
        if isinstance(result, CollabError):
            which = f"{picture.name}: {question}: " if self._several else ""
            self._print_error(f"{which}{result}", result)
            return
        title = Text.assemble(
            (f"{printable(picture.name)}: ", "dim"), (printable(question), "bold")
        )
        self._console.print(title)
        self._console.print(history(result, picture))
        if self._show_map and result.map is not None:
            self._console.print(heat(result))

    def note(self, line: str) -> None:
        """Print a line."""
        self._console.print(Text(printable(line), style="dim"))

    def _print_error(self, line: str, error: CollabError) -> None:
        if self._live is not None:
            self._live.stop()  # it would overwrite a line on stderr
        report(line, error_name(error), as_json=False)
        if self._live is not None:
            self._live.start()

    def _growing(self) -> Group:
        return Group(*list(self._texts.values())[:_LIVE_LINES])


def as_dict(answer: EdgeAnswer, picture: Picture) -> dict[str, object]:
    """Return an answer as a JSON object; names and units are part of the command's interface."""
    heat_map = answer.map and [
        list(answer.map[i : i + answer.columns]) for i in range(0, len(answer.map), answer.columns)
    ]
    return {
        "answer": answer.text,
        "stage": answer.stage.name.lower(),
        "refined": answer.refined,
        "fallback": answer.fallback.name.lower(),
        "declined": None if answer.declined is None else answer.declined.name.lower(),
        "uncertainty": answer.uncertainty,
        "first_answer": answer.first_text,
        "first_uncertainty": answer.first_uncertainty,
        "size": picture.size,
        "box": answer.box,
        "grid": (answer.rows, answer.columns),
        "map": heat_map,
        "bytes_up": answer.bytes_up,
        "bytes_down": answer.bytes_down,
        "view_bytes": answer.view_bytes,
        "region_bytes": answer.region_bytes,
        "original_bytes": answer.original_bytes,
        "shown": round(answer.shown, 4),
        "elapsed_s": round(answer.elapsed_s, 4),
        "model": answer.model,
        "usage": {name: getattr(answer.usage, name) for name in answer.usage.__struct_fields__},
    }


def history(answer: EdgeAnswer, picture: Picture) -> Table:
    """Return the answer, how it was made, and its cost as table rows."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    unsure = answer.box is not None or answer.refined or answer.fallback is not Fallback.NONE
    if unsure:
        rows.add_row(
            "  first answer", _answer_text(answer.first_text, answer.first_uncertainty, "yellow")
        )
    if answer.box is not None:
        box, size = answer.box, picture.size
        rows.add_row(
            "  region",
            f"{box.width} x {box.height} px at ({box.left}, {box.top}) "
            f"of {size.width} x {size.height}",
        )
    if answer.refined:
        # No colour that means "better": the refined answer may be less sure, and whether a larger
        # number means more or less sure depends on the server's metric.
        rows.add_row("  refined answer", _answer_text(answer.text, answer.uncertainty))
    elif unsure:
        why = _FALLBACK_REASONS.get(answer.fallback, "the server kept it")
        if answer.fallback is Fallback.DECLINED and answer.declined in _DECLINE_REASONS:
            why = f"{why}, {_DECLINE_REASONS[answer.declined]}"
        rows.add_row("  answer", f"the first one: {why}")
    else:
        rows.add_row("  answer", _answer_text(answer.text, answer.uncertainty))
    if answer.shown < 1:
        rows.add_row("  not shown", Text(f"{cut_off(answer)}", style="yellow"))
    rows.add_row("  sent", _cost(answer))
    return rows


def cut_off(answer: EdgeAnswer) -> str:
    """Describe the part of the picture that the model did not see."""
    return (
        f"{1 - answer.shown:.0%} of the picture, at its edges: the server's fit is `crop`, "
        "which shows the model only the middle"
    )


def _answer_text(text: str, uncertainty: float, colour: str = "") -> Text:
    return Text.assemble(
        (shown_text(text), f"bold {colour}"), (f"  uncertainty {uncertainty:.3f}", "dim")
    )


def shown_text(text: str) -> str:
    """Return an answer for people: printable, or `NO_TEXT` if it is blank."""
    line = printable(text)
    return line if line.strip() else NO_TEXT


def _cost(answer: EdgeAnswer) -> str:
    sent = decimal(answer.bytes_up)
    if answer.original_bytes:
        share = answer.bytes_up / answer.original_bytes
        sent += f" of {decimal(answer.original_bytes)} ({share:.1%})"
    return f"{sent}, received {decimal(answer.bytes_down)}, {answer.elapsed_s:.2f} s"


def heat(answer: EdgeAnswer) -> Text:
    """Draw the relative attention map as shades, two characters per cell."""
    assert answer.map is not None
    text = Text(no_wrap=True, end="")
    for row in range(answer.rows):
        cells = answer.map[row * answer.columns : (row + 1) * answer.columns]
        shades = (_SHADES[value * (len(_SHADES) - 1) // 255] * 2 for value in cells)
        text.append("  " + "".join(shades) + "\n", style="red")
    return text
