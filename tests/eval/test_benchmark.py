"""The generated benchmark: reproducible, with right answers and balanced questions."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Image as ImageFeature
from datasets import config, load_dataset
from PIL import Image

from eval.demo_model.words import COUNT_SIGNS, presence_question
from eval.signs.build import build, main
from eval.signs.card import PAGE, card, digest, page
from eval.signs.samples import (
    DEFAULT_COUNT,
    FIRST_SCENE,
    SPLITS,
    STYLE,
    Item,
    Kind,
    TextSize,
    item,
    photograph,
    scene_of,
    text_size,
)
from eval.signs.sampling import generate_scene
from eval.signs.scenes import COLOURS, SHAPES, Split
from eval.tasks import open_task
from eval.tasks.signs import Signs

ROOT = Path(__file__).parents[2]
COUNT = 600


@pytest.fixture(scope="module")
def items() -> dict[Split, list[Item]]:
    return {split: [item(split, index) for index in range(COUNT)] for split in SPLITS}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- questions ------------------------------------------------------------------------------


def test_a_sample_depends_on_nothing_but_its_split_and_index(
    items: dict[Split, list[Item]],
) -> None:
    scene_of.cache_clear()
    photograph.cache_clear()
    again = item("val", 401), item("val", 17), item("val", 16)
    assert again == (items["val"][401], items["val"][17], items["val"][16])
    file = photograph("val", 3)
    photograph.cache_clear()
    assert photograph("val", 3) == file


def test_ids_are_unique_and_pictures_are_shared_by_two(items: dict[Split, list[Item]]) -> None:
    for split, made in items.items():
        assert len({one.id for one in made}) == COUNT
        assert set(Counter(one.image_id for one in made).values()) == {2}
        assert all(one.id.startswith(split) for one in made)
        assert {one.kind for one in made[::2]} == {Kind.NUMBER}
        assert Counter(one.kind for one in made[1::2]) == {
            Kind.PRESENCE: 100, Kind.COLOUR: 100, Kind.COUNT: 100,
        }  # fmt: skip


def test_every_answer_is_what_the_scene_shows(items: dict[Split, list[Item]]) -> None:
    for split, made in items.items():
        for one in made:
            scene = scene_of(split, one.picture)
            assert scene == generate_scene(
                split, FIRST_SCENE + one.picture, size=(one.width, one.height), style=STYLE
            )
            signs = {sign.name: sign for sign in scene.signs}
            if one.kind is Kind.COUNT:
                assert (one.question, one.answer) == (COUNT_SIGNS, str(len(signs)))
                assert one.box is None
                continue
            colour, shape = one.question.removesuffix("?").split()[-2:]
            name = f"{colour} {shape}"
            if one.kind is Kind.NUMBER:
                assert one.question == f"what number is on the {name}?"
                sign = signs[name]
                assert (one.answer, one.box) == (sign.text, sign.text_box)
                assert one.text_height_px == sign.text_height_px
            else:
                assert one.question == presence_question(colour, shape)
                assert one.answer == ("yes" if name in signs else "no")


def test_yes_and_no_are_equally_frequent(items: dict[Split, list[Item]]) -> None:
    for made in items.values():
        for kind in (Kind.PRESENCE, Kind.COLOUR):
            answers = Counter(one.answer for one in made if one.kind is kind)
            assert answers == {"yes": 50, "no": 50}


def test_only_the_colour_decides_a_colour_question(items: dict[Split, list[Item]]) -> None:
    for split, made in items.items():
        for one in (one for one in made if one.kind is Kind.COLOUR):
            colour, shape = one.question.removesuffix("?").split()[-2:]
            shown = [s for s in scene_of(split, one.picture).signs if tuple(s.box) == one.box]
            assert [sign.shape for sign in shown] == [shape]
            assert (shown[0].colour == colour) is (one.answer == "yes")


def test_an_absent_sign_is_any_colour_and_shape(items: dict[Split, list[Item]]) -> None:
    absent = [
        tuple(one.question.removesuffix("?").split()[-2:])
        for made in items.values()
        for one in made
        if one.kind is Kind.PRESENCE and one.answer == "no"
    ]
    assert {colour for colour, _ in absent} == set(COLOURS)
    assert {shape for _, shape in absent} == set(SHAPES)


def test_a_presence_question_has_a_box_only_if_the_sign_is_there(
    items: dict[Split, list[Item]],
) -> None:
    asked = [one for one in items["test"] if one.kind is Kind.PRESENCE]
    assert all((one.box is not None) is (one.answer == "yes") for one in asked)


@pytest.mark.parametrize(
    ("px", "size"),
    [
        (3.9, "tiny"),
        (4.0, "small"),
        (4.99, "small"),
        (5.0, "medium"),
        (7.9, "medium"),
        (8, "large"),
    ],
)
def test_a_text_is_binned_by_its_height_in_the_view(px: float, size: str) -> None:
    assert text_size(px) == size


def test_every_text_size_occurs_often_enough_to_report(items: dict[Split, list[Item]]) -> None:
    for made in items.values():
        sizes = Counter(one.text_size for one in made if one.kind is Kind.NUMBER)
        assert min(sizes[size] for size in TextSize) > 0.05 * COUNT / 2
        for one in made:
            assert (one.text_size is not None) is (one.kind is Kind.NUMBER)
            if one.text_height_px is not None:
                assert one.text_size == text_size(one.text_height_px * 112 / one.height)


def test_splits_show_different_scenes(items: dict[Split, list[Item]]) -> None:
    shown = {
        split: {tuple(sign.centre for sign in scene_of(split, one.picture).signs) for one in made}
        for split, made in items.items()
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not shown[one] & shown[other]


# --- as a task ------------------------------------------------------------------------------


def test_a_box_shows_the_answer() -> None:
    """The box contains the digits' colour, and the picture is that of the sample."""
    for index in range(0, 8, 2):
        made = item("val", index)
        picture = Image.open(io.BytesIO(photograph("val", made.picture))).convert("L")
        assert picture.size == (made.width, made.height)
        assert made.box is not None
        low, high = picture.crop(made.box).getextrema()
        assert high - low > 100


def test_summaries_are_by_kind_and_by_text_size() -> None:
    task = open_task("signs", limit=60)
    samples = list(task)
    truths = [sample.truth for sample in samples]
    answers = [
        sample.truth.answers[0] if sample.truth.extra["text_size"] != "tiny" else "unreadable"
        for sample in samples
    ]
    kinds = task.summaries["kind"](answers, truths)
    sizes = task.summaries["text_size"](answers, truths)
    assert set(kinds) == set(Kind) == {sample.category for sample in samples}
    assert (kinds["presence"], kinds["colour"], kinds["count"]) == (1.0, 1.0, 1.0)
    assert 0.0 < kinds["number"] < 1.0
    assert sizes == {"tiny": 0.0, **{size: 1.0 for size in sizes if size != "tiny"}}


def test_a_task_has_as_many_samples_as_requested() -> None:
    assert len(open_task("signs")) == DEFAULT_COUNT
    more = open_task("signs", split="train", limit=DEFAULT_COUNT + 5)
    assert len(list(more)) == DEFAULT_COUNT + 5
    with pytest.raises(IndexError):
        more[DEFAULT_COUNT + 5]


# --- as a data set --------------------------------------------------------------------------


def test_a_folder_has_the_same_samples_as_the_task(tmp_path: Path) -> None:
    build(tmp_path / "signs", "val", 11)
    here = open_task("signs", split="val", limit=11)
    there = open_task("signs", split="val", data=tmp_path / "signs")
    assert len(there) == 11
    for one, other in zip(here, there, strict=True):
        assert one.picture() == other.picture()
        for name in ("id", "image_id", "question", "truth", "category", "true_box"):
            assert getattr(one, name) == getattr(other, name)


def test_a_folder_loads_as_a_data_set(tmp_path: Path) -> None:
    build(tmp_path, "val", 4)
    build(tmp_path, "test", 6)
    loaded = load_dataset(str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"val": 4, "test": 6}
    assert isinstance(loaded["test"].features["image"], ImageFeature)
    assert loaded["test"][0]["image"].size == (896, 896)
    rows = load_dataset("parquet", data_files=str(tmp_path / "data" / "test-*.parquet"))["train"]
    assert rows.cast_column("image", ImageFeature(decode=False))[1]["image"] == {
        "bytes": photograph("test", 0),
        "path": "test-000000.jpg",
    }


def test_a_picture_of_two_questions_is_stored_once(tmp_path: Path) -> None:
    path = build(tmp_path, "test", 16)
    pictures = sum(len(photograph("test", picture)) for picture in range(8))
    assert pictures * 0.9 < path.stat().st_size < pictures * 1.1
    assert pq.read_metadata(path).num_rows == 16


def test_the_same_command_writes_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path,
) -> None:
    one = build(tmp_path / "one", "test", 18)
    command = ["-m", "eval.signs.build", "--split", "test", "--count", "18", "--workers", "2"]
    ended = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    other = Path(ended.stdout.strip())
    assert other.read_bytes() == one.read_bytes()
    cards = [(tmp_path / name / "README.md").read_text() for name in ("one", "two")]
    assert cards == [card([("test", 18)])] * 2


def test_an_interrupted_build_leaves_no_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(split: Split, picture: int) -> bytes:
        if picture == 3:
            raise KeyboardInterrupt
        return photograph(split, picture)

    monkeypatch.setattr("eval.signs.build.photograph", drawn)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "test", 10)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--count", "0"], "--count and --workers must be at least 1"),
        (["--count", "2", "--out", "/dev/null/x"], "cannot write /dev/null/x: Not a directory"),
    ],
)
def test_a_wrong_command_gets_one_clear_line(
    options: Sequence[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--out", "/dev/null/x", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


# --- the card -------------------------------------------------------------------------------


def test_the_benchmark_page_is_up_to_date() -> None:
    """The page's digests also pin every question, answer and box of the default splits."""
    assert PAGE.read_text(encoding="utf-8") == page([(s, DEFAULT_COUNT) for s in SPLITS]), (
        "run `python -m eval.signs.card`"
    )


def test_the_digest_changes_with_one_answer(items: dict[Split, list[Item]]) -> None:
    some = items["test"][:10]
    assert digest(some) != digest([*some[:9], replace(some[9], answer="7")])


def test_answers_are_normalised_before_scoring() -> None:
    truth = open_task("signs", limit=6)[5].truth  # how many signs
    number = {"3": "three", "4": "Four.", "5": " five ", "6": "The six"}[truth.answers[0]]
    assert Signs.scorers["exact"](number, truth) == 1.0
    assert Signs.scorers["exact"](f"{number} signs", truth) == 0.0
