"""Pillow's decoders within bounds, for `images` and `source_image`.

The input is a picture that passed `vlm_collab.pictures.headers`, without its metadata. The size and
frames that the decoder finds are checked once more. Each format is opened by its own decoder class,
not by `Image.open`: no other decoder sees the bytes, the pixel limit is the caller's instead of
Pillow's process-wide one, and the second pictures that phones append to a JPEG are ignored.
Pillow's settings are not changed. Any exception of a decoder becomes an error of this project with
a message of one line.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlm_collab.errors import ImageError, ImageTooLargeError, UnsupportedImageError
from vlm_collab.pictures.container import (
    Codec,
    StoredHeader,
    check_frames,
    check_pixels,
    orientation_in,
)
from vlm_collab.pictures.headers import identify
from vlm_collab.pictures.webp import canvas_size

ALL_CODECS = frozenset(Codec)

# The inverse of each EXIF orientation: how stored pixels become upright ones.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DECODERS: dict[Codec, type[ImageFile]] = {
    Codec.JPEG: JpegImageFile,
    Codec.PNG: PngImageFile,
    Codec.WEBP: WebPImageFile,
}

# Used only in the message about a refused file.
_OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF"}


def open_bounded(data: bytes, codec: Codec, max_pixels: int, max_frames: int) -> ImageFile:
    """Open a picture lazily and check its size and frames.

    Args:
        data: result of `headers.pixels_only`.
        codec: its format.
        max_pixels, max_frames: most pixels and frames.

    Raises:
        ImageTooLargeError, ImageError: one line.
    """
    if codec is Codec.WEBP:
        # Pillow's WebP decoder allocates its canvas on opening, so the size is read first.
        check_pixels(canvas_size(data), max_pixels)
    with _decoder_errors(codec, "its header is damaged"):
        image = _DECODERS[codec](io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    check_pixels(image.size, max_pixels)
    check_frames(frames, max_frames)
    return image


def open_checked(pixels: bytes, codec: Codec, stored: StoredHeader) -> ImageFile:
    """Open the result of `pixels_only` lazily, and check it against the header.

    Raises:
        ImageTooLargeError, ImageError: the decoder disagrees with the header.
    """
    image = open_bounded(pixels, codec, stored.width * stored.height, stored.frames)
    if image.size != (stored.width, stored.height):
        raise ImageError(f"a broken {codec.name} picture: it names two sizes")
    return image


def agreed_codec(data: bytes, codecs: frozenset[Codec]) -> Codec:
    """The format of a picture, by its first bytes.

    Raises:
        UnsupportedImageError: it is none of `codecs`.
    """
    codec = identify(data)
    if codec is None or codec not in codecs:
        found = f"a {codec.name} picture" if codec else describe(data)
        raise UnsupportedImageError(f"{found}; usable formats: {codec_names(codecs)}")
    return codec


def describe(data: bytes) -> str:
    """Guess the format of a file that is none of the three, for a message."""
    for magic, name in _OTHER_FORMATS.items():
        if data.startswith(magic):
            return f"a {name} file"
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    return "not a picture"


def codec_names(codecs: Iterable[Codec]) -> str:
    """Names of codecs for a message."""
    return ", ".join(codec.name for codec in sorted(codecs)) or "none"


@contextlib.contextmanager
def _decoder_errors(codec: Codec | None, detail: str) -> Iterator[None]:
    """Turn exceptions of decoders into one clear line.

    Args:
        codec: the format; None if unknown.
        detail: what is probably wrong.
    """
    try:
        yield
    except ImageError:
        raise  # one of ours
    except Image.DecompressionBombError as error:
        # Pillow's own limit, for the whole process, where it checks on opening (WebP).
        raise ImageTooLargeError("more pixels than the decoder takes") from error
    except MemoryError as error:
        raise ImageTooLargeError("too many pixels for this machine's memory") from error
    except Exception as error:
        # Pillow does not document what its decoders raise, and the bytes can be anything.
        if "truncated" in str(error):
            detail = "it is cut short"
        name = f" {codec.name}" if codec else ""
        raise ImageError(f"a broken{name} picture: {detail}") from error


def loaded(image: Image.Image) -> Image.Image:
    """Decode all pixels and bring them to 8-bit L, RGB or CMYK without transparency.

    Raises:
        UnsupportedImageError: its mode has no RGB form.
        ImageTooLargeError, ImageError: one line.
    """
    codec = next((c for c, kind in _DECODERS.items() if isinstance(image, kind)), None)
    with _decoder_errors(codec, "its pixels are damaged"):
        image.load()
        return flatten(image)


def flatten(image: Image.Image) -> Image.Image:
    """Convert to 8-bit L, RGB or CMYK on a white background, so that pixels can be resampled."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255. 65535 / 257 is exactly 255.
        wide = image.convert("I")
        return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError("a broken picture: its palette is missing")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("F", "LAB"):
        raise UnsupportedImageError(f"pixels of mode {image.mode} have no plain RGB form")
    return image.convert("L" if image.mode == "1" else "RGB")


def to_srgb(image: Image.Image, icc: object) -> Image.Image:
    """Convert a flattened picture to sRGB, by its ICC profile if it has one."""
    if isinstance(icc, bytes) and icc:
        from PIL import ImageCms  # slow to import, and few pictures need it

        # A Pillow built without LittleCMS raises ImportError on first use.
        with contextlib.suppress(ImportError, OSError, ImageCms.PyCMSError):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if it is missing or unreadable."""
    # Not image.getexif(): for a PNG without EXIF that decodes the whole picture.
    block = image.info.get("exif")
    return orientation_in(block) if isinstance(block, bytes) else 1


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Size of a stored picture after its EXIF orientation is applied."""
    return (size[1], size[0]) if orientation >= 5 else (size[0], size[1])


def transposed(image: Image.Image, orientation: int) -> Image.Image:
    """A stored picture, turned upright by its EXIF orientation."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
