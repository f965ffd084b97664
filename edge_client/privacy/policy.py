"""Load the policy file, which says for each camera what may leave the device.

::

    policy = load_policy("edge-policy.yaml")
    camera = policy.for_camera("front-door")

The file is YAML; `docs/privacy.md` describes it and `configs/edge-policy.yaml` is a complete
example. Everything in it is checked when it is loaded. An unknown key is refused, because a limit
that is silently ignored is worse than none. `edge_client.privacy.guard` enforces the policy.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_client.privacy.areas import HiddenArea, Mask, Rectangle
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box, Size

DEFAULT_CAMERA = "default"
"""This entry provides the rules that a camera's entry leaves out, and the rules for pictures that
belong to no camera. A camera without an entry of its own is refused."""

NO_LIMIT = "none"
"""Value that lifts a limit of the `default` entry for a camera."""


class Hours(msgspec.Struct, frozen=True):
    """A daily time window; it spans midnight if its end is before its start.

    Attributes:
        start, end: minutes after midnight, local time; the end is excluded.
    """

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Parse a text such as `22:00-06:30`.

        Raises:
            ValueError: another format, or an empty window.
        """
        try:
            start, end = (_minutes(part) for part in text.split("-"))
        except ValueError:
            raise ValueError(f'"{text}" is not a time window such as "22:00-06:30"') from None
        if start in (end, _DAY):
            raise ValueError(f'"{text}" is empty; a whole day is "00:00-24:00"')
        return cls(start, end)

    def holds(self, when: datetime.time) -> bool:
        """Whether a local time of day lies in the window."""
        minute = when.hour * 60 + when.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return "-".join(f"{m // 60:02}:{m % 60:02}" for m in (self.start, self.end))


class CameraPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one camera. The defaults allow everything.

    Attributes:
        name: name of the camera.
        hide: areas that are black in everything that leaves.
        max_region_share: largest region, as a share of the picture's area, 0 to 1.
        max_regions_per_question: most regions of one question; None for no limit.
        max_bytes_per_hour: most bytes of encoded images within any 3600 s; None for no limit.
        max_view_pixels: largest global view, width × height in px; None for no limit besides
            that of `vlm_collab.protocol.edge_session.EdgeLimits`.
        quiet_hours: when nothing may leave, in the device's local time.
    """

    name: str = DEFAULT_CAMERA
    hide: tuple[HiddenArea, ...] = ()
    max_region_share: float = 1.0
    max_regions_per_question: int | None = None
    max_bytes_per_hour: int | None = None
    max_view_pixels: int | None = None
    quiet_hours: tuple[Hours, ...] = ()

    def hidden(self, size: Size) -> tuple[Box, ...]:
        """Return the hidden boxes of a picture of this size, in px of the upright picture.

        Raises:
            PrivacyError: the policy was made for another aspect ratio.
        """
        return tuple(box for area in self.hide for box in area.boxes(size))

    def quiet(self, when: datetime.datetime) -> Hours | None:
        """Return the quiet hours that contain a moment; None if none do.

        Args:
            when: a time with a time zone; it is converted to the device's local time.
        """
        local = when.astimezone().time()
        return next((hours for hours in self.quiet_hours if hours.holds(local)), None)


class PrivacyPolicy(msgspec.Struct, frozen=True):
    """A loaded policy file.

    Attributes:
        cameras: by name; `DEFAULT_CAMERA` may be among them.
        source: the file, for messages.
    """

    cameras: Mapping[str, CameraPolicy] = msgspec.field(default_factory=dict)
    source: str = "the policy"

    def for_camera(self, name: str | None = None) -> CameraPolicy:
        """Return the rules of a camera.

        Args:
            name: name of the camera; None for a picture of no camera, which gets `default`.

        Raises:
            ConfigError: the camera has no entry. Its pictures are not sent before the owner has
                decided, and a misspelled name must not get rules that hide less.
        """
        name = name or DEFAULT_CAMERA
        found = self.cameras.get(name)
        if found is None:
            raise ConfigError(
                f'{self.source}: no camera "{name}"; it has {_comma_list(self.cameras)} (an empty '
                f'entry takes all rules from "{DEFAULT_CAMERA}")'
            )
        return msgspec.structs.replace(found, name=name)


def load_policy(path: str | os.PathLike[str]) -> PrivacyPolicy:
    """Read a policy file and its masks.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown key or an impossible
            value. The message names the file, the place and the known keys.
    """
    file = Path(path)
    cameras = _checked_mapping(_load_yaml(file), ("cameras",), str(file)).get("cameras")
    if not isinstance(cameras, dict) or not cameras:
        raise ConfigError(f'{file}: "cameras" must map the names of cameras to their rules')
    cameras = {name: {} if rules is None else rules for name, rules in cameras.items()}
    defaults = cameras.get(DEFAULT_CAMERA, {})
    loaded = {}
    # The default first, so that a mistake in it is not reported for a camera that inherits it.
    for name in sorted(cameras, key=lambda name: name != DEFAULT_CAMERA):
        where = f"{file}: camera {name}"
        if not isinstance(name, str):
            raise ConfigError(f"{where}: a name must be text; put it in quotes")
        rules = _checked_mapping(cameras[name], _Rules.__struct_fields__, where)
        loaded[name] = _camera(name, defaults | rules, where, file.parent)
    return PrivacyPolicy(loaded, str(file))


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class _Area(msgspec.Struct):
    """One entry of `hide`; exactly one of the first three fields is given."""

    fractions: tuple[float, float, float, float] | msgspec.UnsetType = msgspec.UNSET
    px: tuple[int, int, int, int] | msgspec.UnsetType = msgspec.UNSET
    mask: str | msgspec.UnsetType = msgspec.UNSET
    of: tuple[_Positive, _Positive] | msgspec.UnsetType = msgspec.UNSET


class _Rules(msgspec.Struct):
    """The rules of a camera as written in the file."""

    hide: list[_Area] = []
    max_region_share: float = 1.0
    max_regions_per_question: _Count | msgspec.UnsetType = msgspec.UNSET
    max_bytes_per_hour: _Count | msgspec.UnsetType = msgspec.UNSET
    max_view_pixels: _Positive | msgspec.UnsetType = msgspec.UNSET
    quiet_hours: list[str] = []


_LIFTED = tuple(
    field.name for field in msgspec.structs.fields(_Rules) if field.default is msgspec.UNSET
)
"""Rules that `NO_LIMIT` can lift. The others are lifted by a value, such as 1.0 or []."""


def _load_yaml(file: Path) -> object:
    import yaml  # takes some milliseconds; only needed with a policy

    class Loader(yaml.SafeLoader):
        """Refuses a duplicate key, which PyYAML's loader would drop silently."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ConfigError(f"{file}, line {node.start_mark.line + 1}: {twice} occurs twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(file.read_text("utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error


def _checked_mapping(content: object, known: Iterable[str], where: str) -> dict[str, Any]:
    """Return a mapping after checking that all keys are known and have values.

    Raises:
        ConfigError: names the wrong key and the known keys.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: must be a mapping with {_comma_list(known)}")
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f'{where}: "{key}" is not known; known are {_comma_list(known)}')
        if value is None:  # would silently lift a limit of the default
            raise ConfigError(f'{where}: "{key}" has no value; give it one or leave it out')
    return content


def _camera(name: str, content: dict[str, Any], where: str, folder: Path) -> CameraPolicy:
    areas = content.get("hide")
    for number, area in enumerate(areas if isinstance(areas, list) else [], start=1):
        _checked_mapping(area, _Area.__struct_fields__, f"{where}: hide, entry {number}")
    content = {k: v for k, v in content.items() if not (k in _LIFTED and v == NO_LIMIT)}
    try:
        rules = _set_fields(msgspec.convert(content, _Rules))
        if not 0 <= (share := rules["max_region_share"]) <= 1:
            raise ValueError(f"max_region_share must be from 0 to 1, not {share}")
        rules["hide"] = tuple(_hidden(area, folder) for area in rules["hide"])
        rules["quiet_hours"] = tuple(Hours.parse(text) for text in rules["quiet_hours"])
    except (msgspec.ValidationError, ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return CameraPolicy(name=name, **rules)


def _hidden(area: _Area, folder: Path) -> HiddenArea:
    given = _set_fields(area)
    of = given.pop("of", None)
    if len(given) != 1:
        kinds = (name for name in area.__struct_fields__ if name != "of")
        raise ValueError(f"an entry of hide has exactly one of {_comma_list(kinds)}")
    ((kind, value),) = given.items()
    if kind == "px" and of is None:
        raise ValueError(f"px {list(value)} needs of: [width, height], the size of the picture")
    if kind != "px" and of is not None:
        raise ValueError(f"of belongs to px, not to {kind}")
    if kind == "mask":
        return Mask.load(folder / value)
    left, top, right, bottom = value
    width, height = of or (1, 1)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        within = "0 to 1" if of is None else f"{width} x {height} px"
        raise ValueError(
            f"{kind} {list(value)} is not a rectangle [left, top, right, bottom] within {within}"
        )
    return Rectangle(left, top, right, bottom, None if of is None else Size(*of))


def _set_fields(struct: msgspec.Struct) -> dict[str, Any]:
    """Return the fields that are in the file or have a default other than UNSET."""
    fields = msgspec.structs.asdict(struct)
    return {name: value for name, value in fields.items() if value is not msgspec.UNSET}


_DAY = 24 * 60


def _minutes(text: str) -> int:
    hours, minutes = (int(part) for part in text.strip().split(":"))
    if not (0 <= minutes < 60 and 0 <= hours * 60 + minutes <= _DAY):
        raise ValueError(text)
    return hours * 60 + minutes


def _comma_list(names: Iterable[str]) -> str:
    return ", ".join(names)
