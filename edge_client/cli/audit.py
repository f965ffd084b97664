"""`vlm-collab audit`: show what left the device as a table, as JSON, or drawn over the original."""

from __future__ import annotations

import datetime
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from edge_client.cli.errors import report
from edge_client.cli.printing import printable
from edge_client.privacy.audit_log import ImageLine, LoadedLog, ViewLine, read_log
from vlm_collab.errors import ConfigError

_WIDE = 200
_HASH_DIGITS = 12  # enough to tell images apart; the log and its JSON have all digits


def audit(
    log_file: Annotated[Path, typer.Argument(metavar="FILE", help="The audit log.")],
    camera: Annotated[str | None, typer.Option(help="Show only this camera's images.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw what the server saw over this original; needs --out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the drawing (.jpg, .png or .webp).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line: images, then totals.")
    ] = False,
) -> int:
    """Show which images left the device.

    The totals count the encoded images of each hour and camera.
    """
    if (picture is None) != (out is None):
        raise ConfigError("give --picture and --out together")
    log = read_log(log_file)
    if camera is not None:
        kept = tuple(line for line in log.images if line.camera == camera)
        log = LoadedLog(kept, log.hidden, log.broken)
    if log.broken:
        lines = "1 line is" if log.broken == 1 else f"{log.broken} lines are"
        note = f"note: {lines} broken and skipped (a crash can cut a line)"
        report(note, "BROKEN", as_json=False)
    if picture is not None and out is not None:
        _draw(picture, out, log, as_json)
    elif as_json:
        _print_json(log)
    else:
        _print_tables(log)
    return 0


class Total(NamedTuple):
    """The images of one camera that left in one hour."""

    hour: datetime.datetime
    camera: str
    views: int
    regions: int
    bytes: int


def totals(log: LoadedLog) -> list[Total]:
    """Sum up the images that left by hour (device's local time) and camera, sorted by both."""
    found: dict[tuple[datetime.datetime, str], list[ImageLine]] = defaultdict(list)
    for line in log.images:
        hour = line.time.astimezone().replace(minute=0, second=0, microsecond=0)
        found[hour, line.camera].append(line)
    return [
        Total(
            hour,
            camera,
            sum(isinstance(line, ViewLine) for line in lines),
            sum(not isinstance(line, ViewLine) for line in lines),
            sum(line.bytes for line in lines),
        )
        for (hour, camera), lines in sorted(found.items())
    ]


def _print_json(log: LoadedLog) -> None:
    for line in log.images:
        record = msgspec.to_builtins(line)
        record["hidden"] = log.black_in(line)
        print(json.dumps(record))
    for total in totals(log):
        record = {**total._asdict(), "hour": total.hour.isoformat()}
        print(json.dumps({"kind": "total", **record}))


def _print_tables(log: LoadedLog) -> None:
    # Do not wrap lines to a terminal's width if stdout is not a terminal.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    names = ("time", "camera", "picture", "seen", "as", "bytes", "sha256", "question")
    images = Table(*names, title="Images")
    for line in log.images:
        images.add_row(
            f"{line.time.astimezone():%Y-%m-%d %H:%M:%S}",
            Text(printable(line.camera)),
            Text(printable(line.name)),
            _seen(line, log),
            f"{line.size_px[0]} x {line.size_px[1]} {line.codec}",
            decimal(line.bytes),
            Text(printable(line.sha256[:_HASH_DIGITS])),
            Text(printable(line.question)),
        )
    images.columns[5].justify = "right"
    console.print(images)
    sums = Table("hour", "camera", "views", "regions", "bytes", title="Totals")
    for total in totals(log):
        sums.add_row(
            f"{total.hour:%Y-%m-%d %H:00}",
            Text(printable(total.camera)),
            str(total.views),
            str(total.regions),
            decimal(total.bytes),
        )
    for column in sums.columns[2:]:
        column.justify = "right"
    console.print(sums)


def _seen(line: ImageLine, log: LoadedLog) -> str:
    black = log.black_in(line)
    masked = ", black areas unknown" if black is None else ", some black" if black else ""
    if isinstance(line, ViewLine):
        return f"view ({line.fit}){masked}"
    return f"{line.box.width} x {line.box.height} px at ({line.box.left}, {line.box.top}){masked}"


def _draw(photo: Path, out: Path, log: LoadedLog, as_json: bool) -> None:
    # Imported here, because the tables need none of these.
    from edge_client.picture import Picture
    from edge_client.privacy.audit_overlay import draw_overlay
    from vlm_collab.pictures.images import Codec, encode

    suffixes = {".jpg": Codec.JPEG, ".jpeg": Codec.JPEG, ".png": Codec.PNG, ".webp": Codec.WEBP}
    codec = suffixes.get(out.suffix.lower())
    if codec is None:
        raise ConfigError(f"--out {out}: the name must end in .jpg, .png or .webp")
    overlay = draw_overlay(Picture.open(photo), log)
    try:
        out.write_bytes(encode(overlay.image, codec, 92))
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error}") from error
    if as_json:
        counts = {"images": overlay.drawn, "same_bytes": overlay.same, "unknown": overlay.unknown}
        print(json.dumps({"out": str(out), **counts}))
        return
    summary = f"{overlay.drawn} images, {overlay.same} of them byte for byte as sent"
    if overlay.unknown:
        summary += (
            f"; {overlay.unknown} more not drawn, because the log does not list their black areas"
        )
    print(f"{printable(str(out))}: {summary}")
