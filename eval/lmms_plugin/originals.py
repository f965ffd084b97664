"""Find the original files of a document's pictures.

lmms-eval passes decoded pictures to models. But the edge makes views from the file, and the file's
size is the cost of sending the original. So this module looks for the stored file that has the same
pixels as the picture from the task.

If there is none (the task cropped the picture or drew into it), the edge gets the pixels, and the
original's size is that of a JPEG of quality 95. The same size is used if the stored file is a PNG
without a name, which is how `datasets` stores pictures that a task made itself, such as GQA's: a
PNG of a photo is larger than the original, and would make savings look larger than they are.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from edge_client.picture import Picture
from eval.lmms_plugin.questions import LmmsQuestion, require_pictures
from eval.runs.methods.method import SampleError
from vlm_collab.errors import ImageError
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.messages import MAX_PICTURES

RE_ENCODED_QUALITY = 95


@dataclass(frozen=True, slots=True)
class OriginalPicture:
    """One picture of a question.

    Attributes:
        picture: what the edge starts from.
        original_bytes: cost of sending the original.
        own_file: whether that is the size of the stored file, and not of a JPEG made here.
    """

    picture: Picture
    original_bytes: int
    own_file: bool


def originals_of(
    question: LmmsQuestion, documents: Mapping[str, Mapping[str, Any]]
) -> list[OriginalPicture]:
    """Load the pictures of a question.

    Args:
        question: a request.
        documents: data sets by task and split.

    Raises:
        SampleError: the question has no picture, or one that cannot be used.
    """
    rows = documents[question.task][question.split]
    given = list(_flat(question.visuals(rows[question.doc_id])))
    require_pictures(given)
    if len(given) > MAX_PICTURES:
        raise SampleError(f"the question has {len(given)} pictures; the limit is {MAX_PICTURES}")
    stored = list(_stored_files(rows, question.doc_id))
    try:
        return [_original(one, stored) for one in given]
    except ImageError as error:
        raise SampleError(f"the picture: {error}") from error


def _flat(shown: Any) -> Iterator[Any]:
    """Flatten what a task returns: a picture, a list, or nested lists."""
    if isinstance(shown, list | tuple):
        for one in shown:
            yield from _flat(one)
    elif shown is not None:
        yield shown


def _stored_files(rows: Any, index: int) -> Iterator[tuple[bytes, bool]]:
    """All files in a document, undecoded, each with whether it has a name."""
    if not hasattr(rows, "with_format"):
        return
    table = rows.with_format("arrow")[index : index + 1]
    pending = list(table.to_pylist()[0].values())
    while pending:
        value = pending.pop(0)
        if isinstance(value, list):
            pending[:0] = value
        elif isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            named = bool(value["path"])
            if value["bytes"]:
                yield value["bytes"], named
            elif named and os.path.isfile(value["path"]):
                with open(value["path"], "rb") as file:
                    yield file.read(), named


def _original(shown: Any, stored: list[tuple[bytes, bool]]) -> OriginalPicture:
    if isinstance(shown, str | os.PathLike):
        picture = Picture.open(shown)
        return OriginalPicture(picture, picture.original_bytes or 0, own_file=True)
    if not isinstance(shown, Image.Image):
        raise SampleError(f"vlm_collab takes pictures, not {type(shown).__name__}")
    pixels = shown.convert("RGB")
    for data, named in stored:
        if not _shows(data, pixels):
            continue
        picture = Picture.open(data)
        if named or not data.startswith(b"\x89PNG"):
            return OriginalPicture(picture, len(data), own_file=True)
        return OriginalPicture(picture, _re_encoded_bytes(pixels), own_file=False)
    # Without the earlier file's metadata, which could rotate or convert the pixels again.
    pixels.info = {}
    return OriginalPicture(Picture.from_pil(pixels), _re_encoded_bytes(pixels), own_file=False)


def _shows(data: bytes, pixels: Image.Image) -> bool:
    """Whether a file has these pixels when decoded as `datasets` does."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if sorted(image.size) != sorted(pixels.size):
                return False
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return upright.size == pixels.size and upright.tobytes() == pixels.tobytes()
    # Not a picture (a sound, say), or a broken one; Pillow's readers may raise any exception.
    except Exception:
        return False


def _re_encoded_bytes(pixels: Image.Image) -> int:
    return len(encode(pixels, Codec.JPEG, RE_ENCODED_QUALITY))
