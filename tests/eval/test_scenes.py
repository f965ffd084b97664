"""The generated scenes: reproducible, disjoint between splits, with exact boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eval.demo_model.views import full_window
from eval.signs import drawing, sampling, scenes
from eval.signs.drawing import draw, render, render_view
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import SceneStyle

SMALL = (448, 448)
WHOLE = (0.0, 0.0, 448.0, 448.0)
PINNED = [
    ("red triangle", "69", (494, 567, 628, 647)),
    ("orange triangle", "86", (546, 170, 624, 230)),
    ("purple diamond", "94", (448, 758, 546, 815)),
    ("purple cross", "35", (123, 553, 165, 582)),
    ("yellow diamond", "22", (365, 300, 411, 333)),
    ("white square", "99", (181, 425, 231, 458)),
]
"""Signs of test scene 0 with two digits: name, text, box."""


def test_a_scene_depends_on_its_index_only() -> None:
    first = generate_scene("test", 17, size=(896, 672), style=SceneStyle(two_digits=0.5))
    again = generate_scene("test", 17, size=(896, 672), style=SceneStyle(two_digits=0.5))
    assert first == again
    np.testing.assert_array_equal(np.asarray(render(first)), np.asarray(render(again)))
    assert first != generate_scene("test", 18, size=(896, 672), style=SceneStyle(two_digits=0.5))


def test_splits_share_neither_scenes_nor_textures() -> None:
    made = {
        split: [generate_scene(split, index) for index in range(300)]
        for split in ("train", "val", "test")
    }
    layouts = {s: {tuple(g.centre for g in scene.signs) for scene in made[s]} for s in made}
    seeds = {s: {scene.background.seed for scene in made[s]} for s in made}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not layouts[one] & layouts[other]
        assert not seeds[one] & seeds[other]


def test_only_the_test_split_has_the_held_out_font_and_texture() -> None:
    seen = [generate_scene(s, i) for s in ("train", "val") for i in range(200)]
    test = [generate_scene("test", i) for i in range(200)]
    assert scenes.HELD_OUT_FONT not in {g.font for scene in seen for g in scene.signs}
    assert scenes.HELD_OUT_TEXTURE not in {scene.background.family for scene in seen}
    fonts = [g.font for scene in test for g in scene.signs]
    assert 0.4 < fonts.count(scenes.HELD_OUT_FONT) / len(fonts) < 0.6
    families = [scene.background.family for scene in test]
    assert 0.35 < families.count(scenes.HELD_OUT_TEXTURE) / len(families) < 0.65


def test_the_default_style_gives_the_scenes_of_the_committed_figures() -> None:
    scene = generate_scene("test", 0, style=SceneStyle(two_digits=1.0))
    assert scene == generate_scene(
        "test", 0, style=SceneStyle(two_digits=1.0, text_height_power=1.0)
    )
    assert [(g.name, g.text, g.text_box) for g in scene.signs] == PINNED


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 3.0])
def test_text_heights_follow_their_density(power: float) -> None:
    """Shares of drawn heights against the integral of h^-p, by the trapezoidal rule."""
    low, high = 24.0, 160.0
    drawn = np.array([sampling._height(low, high, power, s) for s in np.linspace(0, 1, 20_001)])
    assert drawn[0] == pytest.approx(low)
    assert drawn[-1] == pytest.approx(high)
    assert (np.diff(drawn) > 0).all()
    grid = np.linspace(low, high, 100_001)
    density = grid**-power
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    for edge in (30.0, 48.0, 100.0):
        expected = np.interp(edge, grid, total) / total[-1]
        assert (drawn < edge).mean() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("two_digits", [0.0, 1.0])
def test_number_of_digits(two_digits: float) -> None:
    style = SceneStyle(two_digits=two_digits)
    texts = [g.text for i in range(50) for g in generate_scene("train", i, style=style).signs]
    assert {len(text) for text in texts} == {1 + int(two_digits)}


@pytest.mark.parametrize("size", [(896, 896), (1344, 896), (896, 1200), (448, 448)])
def test_signs_and_texts_lie_inside_the_picture(size: tuple[int, int]) -> None:
    for index in range(100):
        scene = generate_scene("val", index, size=size, style=SceneStyle(two_digits=0.5))
        assert len(scene.signs) >= 2
        for sign in scene.signs:
            assert 0 <= sign.box[0] < sign.box[2] <= size[0]
            assert 0 <= sign.box[1] < sign.box[3] <= size[1]
            assert sign.box[0] <= sign.text_box[0] < sign.text_box[2] <= sign.box[2]
            assert sign.box[1] <= sign.text_box[1] < sign.text_box[3] <= sign.box[3]


def test_signs_do_not_overlap() -> None:
    for index in range(100):
        signs = generate_scene("train", index).signs
        for number, one in enumerate(signs):
            for other in signs[number + 1 :]:
                apart_x = one.box[2] <= other.box[0] or other.box[2] <= one.box[0]
                apart_y = one.box[3] <= other.box[1] or other.box[3] <= one.box[1]
                assert apart_x or apart_y


def test_every_question_names_one_sign() -> None:
    for index in range(200):
        scene = generate_scene("test", index)
        asked = questions(scene)
        assert len({q.text for q in asked}) == len(scene.signs)
        for question, sign in zip(asked, scene.signs, strict=True):
            assert question.text == f"what number is on the {sign.colour} {sign.shape}?"
            assert question.answer == sign.text
            expected = sign.text_height_px * 112 / scene.size[1]
            assert question.view_text_height_px == pytest.approx(expected)


def test_text_pixels_fill_their_box_and_no_more() -> None:
    """If only the digits of a drawing change, only pixels inside the text box change."""
    from dataclasses import replace

    checked = 0
    for index in range(40):
        scene = generate_scene("val", index, size=SMALL)
        sign = scene.signs[0]
        inkless = replace(sign, ink=sign.rgb, outlined=False)
        inked = replace(sign, outlined=False)
        drawings = [
            np.asarray(draw(replace(scene, signs=(s,)), WHOLE, SMALL, exact_texture=False)).astype(
                int
            )
            for s in (inkless, inked)
        ]
        rows, columns = np.nonzero(np.abs(drawings[0] - drawings[1]).sum(-1) > 60)
        left, top, right, bottom = sign.text_box
        assert columns.min() >= left
        assert columns.max() < right
        assert rows.min() >= top
        assert rows.max() < bottom
        # Tight: ink comes within two pixels (blurred edges) of every side.
        assert columns.min() <= left + 2
        assert columns.max() >= right - 3
        assert rows.min() <= top + 2
        assert rows.max() >= bottom - 3
        checked += 1
    assert checked == 40


def test_fast_drawing_shows_the_same_signs() -> None:
    """The training view differs from the reduced picture only in its background."""
    scene = generate_scene("val", 3)
    exact = np.asarray(render_view(scene)).astype(int)
    fast = draw(scene, full_window(scene), (224, 224), exact_texture=False)
    quick = np.asarray(fast.resize((112, 112))).astype(int)
    for sign in scene.signs:
        x0, y0, x1, y1 = (round(v / 8) for v in sign.text_box)
        difference = np.abs(exact - quick)[y0:y1, x0:x1]
        assert difference.mean() < 25


def test_a_crop_is_the_picture_at_full_resolution() -> None:
    scene = generate_scene("val", 5, size=SMALL)
    picture = render(scene)
    window = drawing.crop(picture, (100, 120, 212, 232))
    np.testing.assert_array_equal(np.asarray(window), np.asarray(picture)[120:232, 100:212])
    assert drawing.crop(picture, (100, 120, 212, 232), 56).size == (56, 56)


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="index"):
        generate_scene("train", -1)
    with pytest.raises(ValueError, match="224"):
        generate_scene("train", 0, size=(896, 100))


def test_jitter_changes_digits_and_nothing_else() -> None:
    plain = SceneStyle(two_digits=1.0)
    shaken = SceneStyle(two_digits=1.0, glyph_jitter=0.3)
    leaning, bolder = set(), set()
    for index in range(30):
        before = generate_scene("train", index, style=plain).signs[0]
        after = generate_scene("train", index, style=shaken).signs[0]
        assert replace(after, text_box=before.text_box, slant=0.0, weight=0.0) == before
        left, top, right, bottom = after.text_box
        assert (top, bottom) == (before.text_box[1], before.text_box[3])
        assert after.box[0] <= left < right <= after.box[2]
        leaning.add(after.slant > 0)
        bolder.add(after.weight > 0)
    assert leaning == bolder == {True, False}


@pytest.mark.parametrize("slant", [-0.3, 0.3])
def test_slanted_digits_lean_to_their_side(slant: float) -> None:
    """The ink's centre moves sideways from bottom to top, in the direction of the slant."""
    sign = replace(
        generate_scene("train", 3, style=SceneStyle(two_digits=0.0)).signs[0],
        text="1", slant=slant, text_box=(40, 20, 100, 120), box=(0, 0, 140, 140),
        centre=(70.0, 70.0), diameter_px=140.0, shape="square",
        rgb=(0, 0, 0), ink=(255, 255, 255), outlined=False,
    )  # fmt: skip
    scene = replace(generate_scene("train", 3), signs=(sign,))
    drawn = np.asarray(draw(scene, (0.0, 0.0, 140.0, 140.0), (140, 140)).convert("L"), float)
    ink = np.where(drawn[20:120, 40:100] > 128, 1.0, 0.0)
    columns = np.arange(60)
    middles = [(rows.sum(0) * columns).sum() / rows.sum() for rows in (ink[25:45], ink[55:75])]
    assert (middles[0] - middles[1]) * slant > 0.5
