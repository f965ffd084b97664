"""`vlm-collab demo`: edge and server in one process, over a real WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from PIL import Image
from rich.console import Console

from edge_client.answer import EdgeAnswer
from edge_client.cli import output as show
from edge_client.cli.options import Token, TokenFile, token_of
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from server_plugin.backends.open import demo_package, open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from vlm_collab.errors import ConfigError, QuestionError
from vlm_collab.geometry import Box, Size, frame_of
from vlm_collab.pictures.source_image import SourceImage
from vlm_collab.protocol.messages import Options, Welcome
from vlm_collab.protocol.table import FITS


@dataclass(frozen=True, slots=True)
class Case:
    """A question of the demonstration.

    Attributes:
        photo: the picture's file.
        question: the question.
        truth: the right answer; None for a user's picture.
    """

    photo: Path
    question: str
    truth: str | None


def cases() -> list[Case]:
    """The questions about the demo pictures, in the order of `pictures.json`.

    Raises:
        ModelError: the demo model is not installed.
    """
    folder = Path(demo_package().PICTURES)
    listed = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))["pictures"]
    return [Case(folder / one["file"], one["question"], one["truth"]) for one in listed]


def demo(
    photo: Annotated[
        Path | None, typer.Argument(help="Your picture; by default, the demo pictures.")
    ] = None,
    question: Annotated[str | None, typer.Argument(help="Question about your picture.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG and the results.")] = Path(
        "vlm-collab-demo"
    ),
    server: Annotated[
        str | None, typer.Option(help="Ask this server instead of starting one.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model to start the server with.")] = "demo",
    token: Token = None,
    token_file: TokenFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one line of JSON.")
    ] = False,
) -> None:
    """Start a server with the demo model, and ask it about high-resolution pictures.

    Saves a PNG with each picture, the heat map, the box and the crop, and the results as JSON.
    """
    if (photo is None) != (question is None):
        raise ConfigError("give a picture and a question, or neither")
    if question is not None and not question.strip():
        raise QuestionError("the question is empty")
    questions = [Case(photo, question, None)] if photo and question else cases()
    pictures = {case.photo: Picture.open(case.photo) for case in questions}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}: {error.strerror}") from error
    key = token_of(token, token_file)
    screen: show.Screen = show.JsonLines() if as_json else show.Terminal(show_map=False)
    note = Console(stderr=True, highlight=False)
    welcome, answers = asyncio.run(_ask(questions, pictures, server, model, key, screen, note))
    target = out / "demo.png"
    _draw(questions, answers, welcome, target)
    records = [
        {
            "photo": str(case.photo),
            "question": case.question,
            "truth": case.truth,
            **show.as_dict(answer, pictures[case.photo]),
        }
        for case, answer in zip(questions, answers, strict=True)
    ]
    results = msgspec.json.format(msgspec.json.encode(records), indent=1)
    (out / "demo.json").write_bytes(results + b"\n")
    if not as_json:
        _summary(questions, answers, target)


@contextlib.asynccontextmanager
async def _server(url: str | None, model: str, note: Console) -> AsyncIterator[str]:
    """Yield the server's URL: the given one, or that of a server started here."""
    if url is not None:
        yield url
        return
    with note.status("loading the model …"):
        backend, preset = await asyncio.to_thread(open_model, model)
    try:
        service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
        async with running(service) as url_here:
            yield url_here
    finally:
        await backend.close()


async def _ask(
    questions: list[Case],
    pictures: dict[Path, Picture],
    url: str | None,
    model: str,
    token: str | None,
    screen: show.Screen,
    note: Console,
) -> tuple[Welcome, list[EdgeAnswer]]:
    answers: list[EdgeAnswer] = []
    async with _server(url, model, note) as where, EdgeClient(where, token=token) as client:
        welcome = await client.connect()
        for number, case in enumerate(questions):
            picture = pictures[case.photo]
            answer = await client.ask(picture, case.question, options=Options(want_map=True))
            screen.show(number, picture, case.question, answer)
            answers.append(answer)
    return welcome, answers


def _draw(
    questions: list[Case],
    answers: list[EdgeAnswer],
    welcome: Welcome,
    target: Path,
) -> None:
    # Importing matplotlib takes a second; do it after the answers are shown.
    from eval.report.drawing import DrawnQuestion, draw

    view = Size(welcome.view_width, welcome.view_height)
    drawn = []
    for case, answer in zip(questions, answers, strict=True):
        original = SourceImage.open(case.photo)
        width, height = original.size
        whole = original.region(Box(0, 0, width, height), original.size)
        local = None if answer.region is None else Image.open(io.BytesIO(answer.region))
        frame = frame_of(original.size, FITS[welcome.fit], view)
        drawn.append(DrawnQuestion(whole, case.question, answer, frame, local))
    draw(drawn, target)


def _summary(questions: list[Case], answers: list[EdgeAnswer], target: Path) -> None:
    """Print bytes sent, and how many answers are right."""
    console = Console(highlight=False)
    sent = sum(answer.bytes_up for answer in answers)
    whole = sum(answer.original_bytes or 0 for answer in answers)
    line = f"{len(answers)} questions, {sent:,} bytes sent"
    if whole:
        line += f"; the original files have {whole:,} ({sent / whole:.1%})"
    console.print(f"\n{line}")
    known = [(case, answer) for case, answer in zip(questions, answers, strict=True) if case.truth]
    if known:
        right = sum(answer.text == case.truth for case, answer in known)
        first = sum(answer.first_text == case.truth for case, answer in known)
        console.print(f"right of {len(known)}: {first} first answers, {right} final answers")
    console.print(f"picture: {target}    results: {target.with_suffix('.json')}")
