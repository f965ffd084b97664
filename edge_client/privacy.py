"""What may leave the device, camera by camera, as its owner wrote it down in a policy file.

::

    policy = load_policy("edge-policy.yaml")
    camera = policy.for_camera("front-door")

The file is YAML; `docs/privacy.md` describes it and `configs/edge-policy.yaml` is a complete
example. Everything in it is checked when it is loaded: a word that is not known is refused, since
a limit that is silently ignored is worse than none. `edge_client.guard` is what enforces it.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from vlm_collab.errors import ConfigError, ImageError, PrivacyError
from vlm_collab.geometry import Box, Size

DEFAULT_CAMERA = "default"
"""The entry that fills in what a camera leaves out, and that cameras without an entry get."""

MAX_MASK_PIXELS = 50_000_000
MAX_MASK_BOXES = 20_000
"""A mask is kept as rectangles; one with more of them is noise rather than a drawing."""

_ASPECT_TOLERANCE = 0.01


class Hidden(Protocol):
    """Something that stays on the device."""

    def boxes(self, size: Size) -> Iterable[Box]:
        """Its rectangles in a picture of this size, px of the upright picture.

        Raises:
            PrivacyError: it cannot belong to a picture of this size.
        """


class Rectangle(msgspec.Struct, frozen=True):
    """A rectangle that stays on the device.

    Attributes:
        left, top, right, bottom: its edges, in px of the upright picture, or in fractions of its
            width and height, measured from its top left.
        fractions: which of the two.
    """

    left: float
    top: float
    right: float
    bottom: float
    fractions: bool

    def boxes(self, size: Size) -> Iterator[Box]:
        """The box of all pixels that it touches; see `Hidden`."""
        if self.fractions:
            yield Box(
                int(self.left * size.width),
                int(self.top * size.height),
                math.ceil(self.right * size.width),
                math.ceil(self.bottom * size.height),
            )
            return
        if self.right > size.width or self.bottom > size.height:
            # It was drawn on pictures of another size: it may lie anywhere in this one.
            raise PrivacyError(
                f"the policy hides pixels up to ({self.right:g}, {self.bottom:g}), which a picture "
                f"of {size.width} x {size.height} px does not have; nothing of it is sent"
            )
        yield Box(int(self.left), int(self.top), int(self.right), int(self.bottom))


class Mask(msgspec.Struct, frozen=True):
    """A drawing that lies over the whole picture; what is dark in it stays on the device.

    Attributes:
        path: its file.
        size: width and height of the drawing, px; pictures have its aspect, at any resolution.
        dark: its dark parts as rectangles, px of the drawing.
    """

    path: Path
    size: Size
    dark: tuple[Box, ...]

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a JPEG, PNG or WebP drawing. Darker than mid grey is hidden; transparent is not.

        Raises:
            ConfigError: no usable picture, or no drawing of areas.
        """
        from vlm_collab.images import SourceImage  # Pillow, which few policies need

        try:
            source = SourceImage.open(path, max_pixels=MAX_MASK_PIXELS)
            grey = source.region(Box(0, 0, *source.size), source.size).convert("L")
        except ImageError as error:
            raise ConfigError(f"the mask {error}") from error
        dark = grey.point(lambda value: 1 if value < 128 else 0).tobytes()
        boxes = tuple(islice(_rectangles(dark, source.size), MAX_MASK_BOXES + 1))
        if len(boxes) > MAX_MASK_BOXES:
            raise ConfigError(f"the mask {path} is too intricate; draw plain black areas on white")
        return cls(path, source.size, boxes)

    def boxes(self, size: Size) -> Iterator[Box]:
        """The pixels that its dark parts touch; see `Hidden`."""
        aspect = (size.width * self.size.height) / (size.height * self.size.width)
        if abs(aspect - 1) > _ASPECT_TOLERANCE:
            raise PrivacyError(
                f"the mask {self.path} of {self.size.width} x {self.size.height} px does not fit a "
                f"picture of {size.width} x {size.height} px; nothing of it is sent"
            )
        for left, top, right, bottom in self.dark:
            yield Box(
                left * size.width // self.size.width,
                top * size.height // self.size.height,
                -(-right * size.width // self.size.width),
                -(-bottom * size.height // self.size.height),
            )


class Hours(msgspec.Struct, frozen=True):
    """A daily time window; it passes midnight where its end is before its start.

    Attributes:
        start, end: minutes after midnight, local time; the end does not belong to it.
    """

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Read `22:00-06:30`.

        Raises:
            ValueError: it is written otherwise, or of no length.
        """
        try:
            start, end = (_minutes(part) for part in text.split("-"))
        except ValueError:
            raise ValueError(f'"{text}" is no time window like "22:00-06:30"') from None
        if start in (end, _DAY):
            raise ValueError(f'"{text}" is empty; a whole day is "00:00-24:00"')
        return cls(start, end)

    def holds(self, when: datetime.time) -> bool:
        """Whether a local time of day is in it."""
        minute = when.hour * 60 + when.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return "-".join(f"{m // 60:02}:{m % 60:02}" for m in (self.start, self.end))


class CameraPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What may leave of one camera's pictures. The defaults allow everything.

    Attributes:
        name: of the camera.
        hide: what is black in everything that leaves.
        max_region_share: largest region, as a share of the picture's area, 0 to 1.
        max_regions_per_question: regions that one question may have; None for no bound.
        max_bytes_per_hour: encoded pictures that may leave within any 3600 s; None for no bound.
        quiet_hours: when nothing may leave, in the device's local time.
    """

    name: str = DEFAULT_CAMERA
    hide: tuple[Hidden, ...] = ()
    max_region_share: float = 1.0
    max_regions_per_question: int | None = None
    max_bytes_per_hour: int | None = None
    quiet_hours: tuple[Hours, ...] = ()

    def hidden(self, size: Size) -> tuple[Box, ...]:
        """What is black in a picture of this size, px of the upright picture.

        Raises:
            PrivacyError: the policy was made for pictures of another size or aspect.
        """
        return tuple(box for area in self.hide for box in area.boxes(size))

    def quiet(self, when: datetime.datetime) -> Hours | None:
        """The quiet hours that a moment lies in, if it does.

        Args:
            when: with a time zone; seen in the device's local time.
        """
        local = when.astimezone().time()
        return next((hours for hours in self.quiet_hours if hours.holds(local)), None)


class Policy(msgspec.Struct, frozen=True):
    """A loaded policy file.

    Attributes:
        cameras: by name; `DEFAULT_CAMERA` may be among them.
        source: the file, for messages.
    """

    cameras: Mapping[str, CameraPolicy] = msgspec.field(default_factory=dict)
    source: str = "the policy"

    def for_camera(self, name: str | None = None) -> CameraPolicy:
        """The rules of a camera.

        Args:
            name: of the camera; None for a picture that is of none, to which `default` applies.

        Raises:
            ConfigError: it has no entry. What nobody decided on is not sent, and a misspelled
                name must not get rules that hide less.
        """
        name = name or DEFAULT_CAMERA
        found = self.cameras.get(name)
        if found is None:
            raise ConfigError(
                f'{self.source}: no camera "{name}"; it has {_listed(self.cameras)} (an empty '
                f'entry takes all rules from "{DEFAULT_CAMERA}")'
            )
        return msgspec.structs.replace(found, name=name)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read a policy file, with the masks that it names.

    Raises:
        ConfigError: it is missing, no YAML, or says something that is not known or not possible.
            The line names the file and the place, and what is known there.
    """
    file = Path(path)
    cameras = _checked(_parsed(file), ("cameras",), str(file)).get("cameras")
    if not isinstance(cameras, dict) or not cameras:
        raise ConfigError(f'{file}: "cameras" must map the names of cameras to their rules')
    cameras = {name: {} if rules is None else rules for name, rules in cameras.items()}
    defaults = cameras.get(DEFAULT_CAMERA, {})
    loaded = {}
    # The default first: a mistake in it is then told of it, not of a camera that takes it over.
    for name in sorted(cameras, key=lambda name: name != DEFAULT_CAMERA):
        where = f"{file}: camera {name}"
        if not isinstance(name, str):
            raise ConfigError(f"{where}: a name must be text; put it in quotes")
        rules = _checked(cameras[name], _Rules.__struct_fields__, where)
        loaded[name] = _camera(name, defaults | rules, where, file.parent)
    return Policy(loaded, str(file))


class _Area(msgspec.Struct):
    """One entry of `hide`; exactly one field is given."""

    fractions: tuple[float, float, float, float] | None = None
    px: tuple[int, int, int, int] | None = None
    mask: str | None = None


class _Rules(msgspec.Struct):
    """The rules of a camera as they stand in the file."""

    hide: list[_Area] = []
    max_region_share: float = 1.0
    max_regions_per_question: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_bytes_per_hour: Annotated[int, msgspec.Meta(ge=0)] | None = None
    quiet_hours: list[str] = []


def _parsed(file: Path) -> object:
    import yaml  # takes some milliseconds, which only those with a policy pay

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML's own loader would drop one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ConfigError(f"{file}, line {node.start_mark.line + 1}: {twice} stands twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(file.read_text("utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: no UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: no YAML: {' '.join(str(error).split())}") from error


def _checked(content: object, known: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping, if it is one and has no key that is not known.

    Raises:
        ConfigError: names it, and what is known.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: must be a mapping with {_listed(known)}")
    for key in content:
        if key not in known:
            raise ConfigError(f'{where}: "{key}" is not known; known are {_listed(known)}')
    return content


def _camera(name: str, content: dict[str, Any], where: str, folder: Path) -> CameraPolicy:
    areas = content.get("hide")
    for number, area in enumerate(areas if isinstance(areas, list) else [], start=1):
        _checked(area, _Area.__struct_fields__, f"{where}: hide, entry {number}")
    try:
        rules = msgspec.convert(content, _Rules)
        if not 0 <= rules.max_region_share <= 1:
            raise ValueError(f"max_region_share must be from 0 to 1, not {rules.max_region_share}")
        return CameraPolicy(
            name=name,
            hide=tuple(_hidden(area, folder) for area in rules.hide),
            max_region_share=rules.max_region_share,
            max_regions_per_question=rules.max_regions_per_question,
            max_bytes_per_hour=rules.max_bytes_per_hour,
            quiet_hours=tuple(Hours.parse(text) for text in rules.quiet_hours),
        )
    except (msgspec.ValidationError, ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _hidden(area: _Area, folder: Path) -> Hidden:
    given = [name for name in area.__struct_fields__ if getattr(area, name) is not None]
    if len(given) != 1:
        raise ValueError(f"an entry of hide has exactly one of {_listed(area.__struct_fields__)}")
    if area.mask is not None:
        return Mask.load(folder / area.mask)
    edges = area.px or area.fractions
    assert edges is not None
    left, top, right, bottom = edges
    far = 1 if area.fractions else math.inf
    if not (0 <= left < right <= far and 0 <= top < bottom <= far):
        within = " within 0 to 1" if area.fractions else ""
        raise ValueError(
            f"{given[0]} {list(edges)} is no rectangle [left, top, right, bottom]{within}"
        )
    return Rectangle(left, top, right, bottom, fractions=area.px is None)


_DAY = 24 * 60


def _minutes(text: str) -> int:
    hours, minutes = (int(part) for part in text.strip().split(":"))
    if not (0 <= minutes < 60 and 0 <= hours * 60 + minutes <= _DAY):
        raise ValueError(text)
    return hours * 60 + minutes


def _rectangles(dark: bytes, size: Size) -> Iterator[Box]:
    """The ones of a bitmap as rectangles: the runs of each row, with equal rows below as one."""
    rows = (dark[y * size.width : (y + 1) * size.width] for y in range(size.height))
    top = 0
    for row, same in groupby(rows):
        bottom = top + sum(1 for _ in same)
        left = row.find(1)
        while left >= 0:
            right = row.find(0, left)
            right = size.width if right < 0 else right
            yield Box(left, top, right, bottom)
            left = row.find(1, right)
        top = bottom


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
