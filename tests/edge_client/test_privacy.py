"""The policy file: its rules, and their effect on a picture."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from edge_client.privacy.areas import Mask
from edge_client.privacy.audit_log import RegionLine, ViewLine
from edge_client.privacy.policy import DEFAULT_CAMERA, CameraPolicy, Hours, _Rules, load_policy
from vlm_collab.errors import CollabError, ConfigError, PrivacyError
from vlm_collab.geometry import Box, Size

ROOT = Path(__file__).resolve().parents[2]


def write_policy(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


def camera(folder: Path, rules: str, name: str | None = None) -> CameraPolicy:
    lines = "\n".join(f"    {line}" for line in rules.splitlines())
    return load_policy(write_policy(folder, f"cameras:\n  default:\n{lines}\n")).for_camera(name)


def test_the_example_is_loaded_and_shows_every_rule():
    example = ROOT / "configs/edge-policy.yaml"
    policy = load_policy(example)
    assert DEFAULT_CAMERA in policy.cameras
    rules = policy.for_camera("front-door")
    assert rules.hide
    assert rules.max_region_share < 1
    assert rules.max_regions_per_question is not None
    assert rules.max_bytes_per_hour is not None
    assert rules.max_view_pixels is not None
    assert rules.quiet_hours
    text = example.read_text()
    assert all(word in text for word in ("fractions:", "px:", "of:", "mask:"))


def test_a_camera_inherits_missing_rules_from_the_default(tmp_path):
    policy = load_policy(
        write_policy(
            tmp_path,
            "cameras:\n"
            "  default: {max_region_share: 0.5, max_bytes_per_hour: 99, quiet_hours: ['1:0-2:0']}\n"
            "  garden: {max_region_share: 0.25, quiet_hours: []}\n"
            "  hall:\n",
        )
    )
    garden, hall = policy.for_camera("garden"), policy.for_camera("hall")
    assert (garden.max_region_share, garden.max_bytes_per_hour, garden.quiet_hours) == (
        0.25,
        99,
        (),
    )
    assert (hall.max_region_share, hall.max_bytes_per_hour) == (0.5, 99)
    assert policy.for_camera(None).name == "default"
    # A misspelled name must not get rules that hide less.
    with pytest.raises(ConfigError, match="an empty entry takes all rules"):
        policy.for_camera("gardn")


def test_a_camera_without_an_entry_is_refused(tmp_path):
    policy = load_policy(write_policy(tmp_path, "cameras: {garden: {}}"))
    for name in ("attic", None):
        with pytest.raises(ConfigError, match="garden"):
            policy.for_camera(name)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("camera: {}", ['"camera" is not known', "cameras"]),
        ("cameras: {door: {max_share: 1}}", ["camera door", '"max_share"', "max_region_share"]),
        ("cameras: {default: {hide: [{box: [0, 0, 1, 1]}]}}", ['"box"', "fractions, px, mask"]),
        ("cameras: {default: {hide: [{px: [0, 0, 9, 9], mask: a.png}]}}", ["exactly one"]),
        ("cameras: {default: {hide: [{}]}}", ["exactly one"]),
        ("cameras: {default: {hide: {px: [0, 0, 9, 9]}}}", ["camera default", "array", "hide"]),
        ("cameras: {default: {hide: [{fractions: [0.5, 0, 0.4, 1]}]}}", ["not a rectangle"]),
        ("cameras: {default: {hide: [{fractions: [0, 0, 100, 100]}]}}", ["within 0 to 1"]),
        ("cameras: {default: {hide: [{fractions: [0, 0, .nan, 1]}]}}", ["not a rectangle"]),
        ("cameras: {default: {hide: [{px: [0, 0, 9]}]}}", ["camera default", "length 4"]),
        ("cameras: {default: {hide: [{px: [0, 0, 9, 9]}]}}", ["of: [width, height]"]),
        ("cameras: {default: {hide: [{px: [-1, 0, 9, 9], of: [9, 9]}]}}", ["not a rectangle"]),
        ("cameras: {default: {hide: [{px: [0, 0, 9, 9], of: [9, 8]}]}}", ["within 9 x 8 px"]),
        ("cameras: {default: {hide: [{px: [0, 0, 9, 9], of: [9, 0]}]}}", [">= 1", "of"]),
        ("cameras: {default: {hide: [{of: [9, 9]}]}}", ["exactly one"]),
        ("cameras: {default: {hide: [{mask: a.png, of: [9, 9]}]}}", ["of", "px"]),
        ("cameras: {default: {hide: [{px: , mask: a.png}]}}", ["entry 1", '"px" has no value']),
        ("cameras: {default: {hide: [{mask: gone.png}]}}", ["gone.png: no such file"]),
        ("cameras: {default: {max_region_share: 20}}", ["0 to 1"]),
        ("cameras: {default: {max_region_share: .nan}}", ["0 to 1"]),
        ("cameras: {default: {max_bytes_per_hour: lots}}", ["int", "max_bytes_per_hour"]),
        ("cameras: {default: {max_bytes_per_hour: -1}}", [">= 0", "max_bytes_per_hour"]),
        ("cameras: {default: {max_regions_per_question: 1.5}}", ["max_regions_per_question"]),
        ("cameras: {default: {max_view_pixels: 224x224}}", ["int", "max_view_pixels"]),
        ("cameras: {default: {max_view_pixels: 0}}", [">= 1", "max_view_pixels"]),
        ("cameras: {default: {max_region_share: none}}", ["float", "max_region_share"]),
        ("cameras: {default: {quiet_hours: ['22-6']}}", ['"22-6"', "22:00-06:30"]),
        ("cameras: {default: {quiet_hours: ['22:00-25:00']}}", ["25:00"]),
        ("cameras: {default: {quiet_hours: ['07:00-07:00']}}", ["00:00-24:00"]),
        ("cameras: {default: {quiet_hours: 22:00-06:00}}", ["array", "quiet_hours"]),
        ("cameras: {default: [1]}", ["camera default", "mapping"]),
        ("cameras: {3: {}}", ["camera 3", "quotes"]),
        ("cameras: [door]", ["cameras"]),
        ("cameras:", ["cameras"]),
        ("", ["mapping", "cameras"]),
        ("cameras: {default: {}, door: {}, door: {}}", ["line 1", "door occurs twice"]),
        ("cameras: {default: {", ["not valid YAML"]),
        ("cameras: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
    ],
)
def test_a_wrong_policy_is_reported_in_one_line(text, parts, tmp_path):
    path = write_policy(tmp_path, text)
    with pytest.raises(CollabError) as caught:
        load_policy(path)
    line = str(caught.value)
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in line
    for part in (str(path), *parts):
        assert part in line


def test_an_unreadable_policy_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_policy(tmp_path / "binary.yaml")


@pytest.mark.parametrize("rule", list(_Rules.__struct_fields__))
def test_an_empty_value_lifts_no_limit(rule, tmp_path):
    """An empty value is probably unfinished, and would cancel the limit of the default."""
    rules = "{max_bytes_per_hour: 1000, max_regions_per_question: 1, quiet_hours: ['1:0-2:0']}"
    path = write_policy(tmp_path, f"cameras:\n  default: {rules}\n  door:\n    {rule}:\n")
    with pytest.raises(ConfigError, match=f'camera door: "{rule}" has no value'):
        load_policy(path)


def test_a_camera_lifts_a_default_limit_with_none(tmp_path):
    numbers = ("max_regions_per_question", "max_bytes_per_hour", "max_view_pixels")
    limits = "\n".join(f"    {name}: 1000" for name in numbers)
    lifted = "\n".join(f"    {name}: none" for name in numbers)
    text = f"cameras:\n  default:\n{limits}\n  door:\n{lifted}\n  hall:\n"
    policy = load_policy(write_policy(tmp_path, text))
    for name in numbers:
        assert getattr(policy.for_camera("door"), name) is None
        assert getattr(policy.for_camera("hall"), name) == 1000


def test_rectangles_cover_every_pixel_that_they_touch(tmp_path):
    areas = "hide:\n- fractions: [0.25, 0.5, 0.999, 1]\n- {px: [3, 4, 10, 20], of: [10, 20]}"
    rules = camera(tmp_path, areas)
    assert rules.hidden(Size(10, 20)) == (Box(2, 10, 10, 20), Box(3, 4, 10, 20))
    assert rules.hidden(Size(5, 10)) == (Box(1, 5, 5, 10), Box(1, 2, 5, 10))
    assert rules.hidden(Size(25, 50)) == (Box(6, 25, 25, 50), Box(7, 10, 25, 50))


@pytest.mark.parametrize("size", [(1280, 720), (2560, 1440), (640, 360), (1366, 768)])
def test_an_area_in_px_scales_with_the_picture(size, tmp_path):
    """A camera's streams differ in size; the hidden area is at the same place of the scene."""
    rules = camera(tmp_path, "hide: [{px: [0, 0, 400, 300], of: [1280, 720]}]")
    scene = Image.new("L", (1280, 720), 0)
    scene.paste(255, (0, 0, 400, 300))
    visible = scene.resize(size, Image.Resampling.BOX)
    for box in rules.hidden(Size(*size)):
        visible.paste(0, tuple(box))
    assert visible.getbbox() is None


@pytest.mark.parametrize("size", [(1280, 960), (720, 1280), (400, 300), (1280, 700)])
def test_areas_in_px_do_not_fit_another_aspect_ratio(size, tmp_path):
    rules = camera(tmp_path, "hide: [{px: [0, 0, 40, 30], of: [1280, 720]}]")
    with pytest.raises(
        PrivacyError, match=f"{size[0]} x {size[1]} px; nothing of the picture is sent"
    ):
        rules.hidden(Size(*size))


def test_a_mask_lies_over_pictures_of_any_resolution(tmp_path):
    mask = Image.new("L", (40, 30), 255)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((5, 5, 20, 25), fill=0)
    draw.rectangle((30, 0, 39, 3), fill=90)  # darker than mid grey
    draw.rectangle((0, 28, 39, 29), fill=200)  # lighter
    mask.save(tmp_path / "mask.png")
    rules = camera(tmp_path, "hide: [{mask: mask.png}]")
    for scale in (1, 7, 0.3):
        size = Size(round(40 * scale), round(30 * scale))
        visible = Image.new("L", size, 255)
        for box in rules.hidden(size):
            visible.paste(0, tuple(box))
        for y in range(size.height):
            for x in range(size.width):
                # The mask's pixels under this pixel; it is hidden if one of them is dark.
                left, right = x * 40 // size.width, -(-(x + 1) * 40 // size.width)
                top, bottom = y * 30 // size.height, -(-(y + 1) * 30 // size.height)
                darkest = mask.crop((left, top, right, bottom)).getextrema()[0]
                assert (visible.getpixel((x, y)) == 0) == (darkest < 128), (size, x, y)
    with pytest.raises(PrivacyError, match="does not fit"):
        rules.hidden(Size(30, 40))


def test_transparent_pixels_of_a_mask_hide_nothing(tmp_path):
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (2, 3, 4, 8))
    drawing.save(tmp_path / "mask.png")
    assert Mask.load(tmp_path / "mask.png").dark == (Box(2, 3, 4, 8),)


def test_a_noisy_mask_is_refused(tmp_path):
    Image.effect_noise((400, 300), 90).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match="too complex"):
        Mask.load(tmp_path / "mask.png")


@pytest.fixture
def zone() -> Iterator[None]:
    """Kathmandu time, 5:45 ahead of UTC, so that the test notices mixed-up time zones."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "NPT-5:45"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize(
    ("hours", "local", "quiet"),
    [
        ("22:00-06:00", "22:00", True),
        ("22:00-06:00", "23:59", True),
        ("22:00-06:00", "00:00", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("22:00-06:00", "21:59", False),
        ("12:30-13:00", "12:30", True),
        ("12:30-13:00", "13:00", False),
        ("12:30-13:00", "00:00", False),
        ("18:00-24:00", "23:59", True),
        ("18:00-24:00", "00:00", False),
        ("00:00-24:00", "03:00", True),
    ],
)
def test_quiet_hours_are_local_and_may_span_midnight(hours, local, quiet):
    rules = CameraPolicy(quiet_hours=(Hours.parse("11:11-11:12"), Hours.parse(hours)))
    hour, minute = map(int, local.split(":"))
    nepal = datetime.timezone(datetime.timedelta(hours=5, minutes=45))
    moment = datetime.datetime(2026, 3, 1, hour, minute, 30, tzinfo=nepal)
    found = rules.quiet(moment.astimezone(datetime.UTC))
    assert (str(found) if found else None) == (hours if quiet else None)


def test_the_documentation_names_every_rule_and_field():
    text = (ROOT / "docs/privacy.md").read_text(encoding="utf-8")
    rules = set(CameraPolicy.__struct_fields__) - {"name"}
    areas = {"fractions:", "px:", "of:", "mask:"}
    fields = {*ViewLine.__struct_fields__, *RegionLine.__struct_fields__}
    for word in (*(f"`{name}`" for name in rules | fields), *areas):
        assert word in text, word
