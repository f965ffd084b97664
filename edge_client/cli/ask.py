"""`vlm-collab ask`: ask questions about photos."""

from __future__ import annotations

import asyncio
import enum
import itertools
from pathlib import Path
from typing import Annotated

import typer

from edge_client.answer import EdgeAnswer
from edge_client.cli import output as show
from edge_client.cli.errors import exit_code
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
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions, EdgeClient
from edge_client.link.dial import DEFAULT_URL
from edge_client.picture import Picture
from vlm_collab.errors import CollabError, ConfigError, QuestionError
from vlm_collab.pictures.headers import identify
from vlm_collab.pictures.images import Codec, decode, encode
from vlm_collab.pictures.source_image import MAX_SOURCE_PIXELS
from vlm_collab.protocol.messages import Options

_SAVED_QUALITY = 95
_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".heic", ".avif", ".tif", ".tiff")


class CodecName(enum.StrEnum):
    """Codec names on the command line."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


def ask(
    photo: Annotated[str, typer.Argument(help="A JPEG, PNG or WebP file.")],
    questions: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION", help="A question about the photo; you can give several."
        ),
    ],
    photos: Annotated[
        list[str] | None,
        typer.Option(
            "--photo", "-p", help="One more photo; every question is asked about every photo."
        ),
    ] = None,
    server: ServerUrl = DEFAULT_URL,
    token: Token = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    deadline: Deadline = DEFAULT_DEADLINE_S,
    eta: Eta = None,
    always: Always = False,
    never: Never = False,
    show_map: Annotated[
        bool,
        typer.Option(
            "--show-map",
            "--map",
            help="Show where the model looked, if it was unsure: on screen or in the JSON.",
        ),
    ] = False,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="Quality of the small view as JPEG or WebP.")
    ] = 90,
    codec: Annotated[
        CodecName | None,
        typer.Option(help="Format of the small view; default: the server's choice."),
    ] = None,
    save_crop: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save the region that was sent, if any, to this file (.jpg, .png or .webp).",
        ),
    ] = None,
    policy: PolicyFile = None,
    camera: CameraName = None,
    audit: AuditFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as a JSON object on one line.")
    ] = False,
) -> int:
    """Ask questions about photos.

    A small view of the photo goes to the server. If the model is unsure, it says where it needs
    to look, and only that region is sent, at full resolution.
    """
    for question in questions:
        check_question(question)
    crop_codec = None if save_crop is None else _codec_of(save_crop)
    options = question_options(
        always=always, never=never, eta=eta, deadline_s=deadline, want_map=show_map
    )
    # Open before connecting: a wrong file name is reported without a server.
    pictures = [Picture.open(name) for name in [photo, *(photos or [])]]
    pairs = list(itertools.product(pictures, questions))
    screen: show.Screen = (
        show.JsonLines() if as_json else show.Terminal(show_map=show_map, several=len(pairs) > 1)
    )
    settings: ClientOptions = {
        "token": token_of(token, token_file),
        "ca_file": ca_file,
        "view_quality": quality,
        "view_codec": None if codec is None else Codec[codec.name],
        "policy": policy,
        "camera": camera,
        "audit": audit,
    }
    results = asyncio.run(_ask_all(server, settings, pairs, deadline, options, screen))
    if save_crop is not None and crop_codec is not None:
        _save_crops(save_crop, crop_codec, results, screen)
    failed = [result for result in results if isinstance(result, CollabError)]
    return exit_code(failed[0]) if failed else 0


def check_question(question: str) -> None:
    """Refuse a question that is empty or the name of a picture.

    Otherwise `--show-map map.png` and `ask one.jpg two.jpg "why?"` would take file names as
    questions.

    Raises:
        QuestionError: one line that says what to give instead.
    """
    if not question.strip():
        raise QuestionError("the question is empty")
    if question.lower().endswith(_PICTURE_ENDINGS) and not any(map(str.isspace, question)):
        raise QuestionError(
            f"{question} is the name of a file, not a question; give more photos with --photo and "
            "a file for the region with --save-crop; --show-map takes no file"
        )


async def _ask_all(
    server: str,
    settings: ClientOptions,
    pairs: list[tuple[Picture, str]],
    deadline_s: float,
    options: Options,
    screen: show.Screen,
) -> list[EdgeAnswer | CollabError]:
    """Ask all questions at the same time; show the results in the order of the questions."""
    async with EdgeClient(server, **settings) as client:
        turns = asyncio.Semaphore(max(1, (await client.connect()).max_in_flight))

        async def one(number: int, picture: Picture, question: str) -> EdgeAnswer | CollabError:
            async with turns:
                try:
                    return await client.ask(
                        picture,
                        question,
                        deadline_s=deadline_s,
                        on_text=screen.sink(number, picture, question),
                        options=options,
                    )
                except CollabError as error:
                    return error

        tasks = [
            asyncio.create_task(one(number, picture, question))
            for number, (picture, question) in enumerate(pairs)
        ]
        results = []
        with screen:
            for number, (task, (picture, question)) in enumerate(zip(tasks, pairs, strict=True)):
                result = await task
                screen.show(number, picture, question, result)
                results.append(result)
        return results


def _codec_of(path: Path) -> Codec:
    suffixes = {".jpg": Codec.JPEG, ".jpeg": Codec.JPEG, ".png": Codec.PNG, ".webp": Codec.WEBP}
    codec = suffixes.get(path.suffix.lower())
    if codec is None:
        raise ConfigError(f"--save-crop {path}: the name must end in .jpg, .png or .webp")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--save-crop {path}: no such directory")
    return codec


def _save_crops(
    path: Path,
    codec: Codec,
    results: list[EdgeAnswer | CollabError],
    screen: show.Screen,
) -> None:
    """Save the regions that were sent; for several questions, in numbered files."""
    any_saved = False
    for number, result in enumerate(results, start=1):
        if isinstance(result, CollabError) or result.region is None:
            continue
        name = path if len(results) == 1 else path.with_stem(f"{path.stem}-{number}")
        sent_as = identify(result.region)
        same = sent_as is codec
        try:
            name.write_bytes(result.region if same else _in_format(codec, result.region))
        except OSError as error:
            raise ConfigError(f"--save-crop {name}: {error.strerror or error}") from error
        converted = "" if same or sent_as is None else f" (it was sent as {sent_as.name})"
        screen.note(f"region saved as {name}{converted}")
        any_saved = True
    if not any_saved:
        screen.note("no region was sent, so none was saved")


def _in_format(codec: Codec, region: bytes) -> bytes:
    """Encode a sent region again in the format of the user's file name."""
    pixels = decode(region, max_pixels=MAX_SOURCE_PIXELS)
    return encode(pixels, codec, _SAVED_QUALITY)
