"""The public benchmarks on rows in the hub's layout: samples, settings, and clear errors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config

from eval.tasks import open_task, task_kind
from eval.tasks.catalogue import TASKS
from eval.tasks.hub import HubTask
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo, turned
from vlm_collab.errors import ConfigError, ImageError

JPEG = turned(photo(), 6)  # has EXIF, which encoding again would lose
PNG_LIKE = b"never decoded, so any bytes do"
PICTURES = (JPEG, PNG_LIKE)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes rows as Parquet like the hub's, with pictures as {bytes, path}."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(file: str, rows: Sequence[Mapping[str, Any]], *, pictures: bool = True) -> Path:
        path = tmp_path / "hub" / f"{file}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if pictures:
            shown = [{"bytes": p, "path": f"{n}.jpg"} for n, p in enumerate(PICTURES * len(rows))]
            rows = [{**row, "image": image} for row, image in zip(rows, shown, strict=False)]
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return tmp_path / "hub"

    return write


def textvqa_rows(count: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "question_id": 30 + n,
            "image_id": f"{n // 2:016x}",
            "question": f"what is on sign {n}?",
            "answers": ["stop"] * 10,
            "ocr_tokens": ["STOP", "12"],
        }
        for n in range(count)
    ]


def aokvqa_rows(**changed: Any) -> list[dict[str, Any]]:
    row: dict[str, Any] = {
        "question": "What is he waiting for?",
        "choices": ["bus", "A train", "cab", "ship"],
        "correct_choice_idx": 2,
        "direct_answers": "['cab', 'cab', 'cab', 'taxi', 'bus', 'bus', 'ride', 'car', 'a', 'b']",
    }
    rows = [{"question_id": f"q{n}", **row, "difficult_direct_answer": n == 1} for n in range(3)]
    return [{**row, **changed} for row in rows]


# --- samples --------------------------------------------------------------------------------


def test_a_sample_s_picture_is_the_stored_file_byte_by_byte(data: Callable[..., Path]) -> None:
    task = open_task("textvqa", data=data("data/validation-00000-of-00001", textvqa_rows()))
    assert [sample.picture() for sample in task] == list(PICTURES)


def test_a_picture_stored_as_a_path_is_read_from_there(
    data: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "there.jpg"
    file.write_bytes(JPEG)
    there = {"bytes": None, "path": str(file)}
    gone = {"bytes": None, "path": str(tmp_path / "gone.jpg")}
    images = [{"image": there}, {"image": gone}]
    rows = [{**row, **image} for row, image in zip(textvqa_rows(), images, strict=True)]
    task = open_task("textvqa", data=data("validation", rows, pictures=False))
    assert task[0].picture() == JPEG
    with pytest.raises(ImageError, match="row 1 of the benchmark has no picture"):
        task[1].picture()


def test_files_of_a_split_are_read_in_order_and_up_to_the_limit(
    data: Callable[..., Path],
) -> None:
    rows = textvqa_rows(5)
    data("data/validation-00001-of-00002", rows[3:])
    data("data/train-00000-of-00001", rows[:1])
    folder = data("data/validation-00000-of-00002", rows[:3])
    assert [sample.id for sample in open_task("textvqa", data=folder)] == [
        "30", "31", "32", "33", "34",
    ]  # fmt: skip
    few = open_task("textvqa", data=folder, limit=4)
    assert (len(few), few[3].id) == (4, "33")
    with pytest.raises(IndexError):
        few[4]
    assert len(open_task("textvqa", data=folder, limit=99)) == 5
    assert len(open_task("textvqa", data=folder, split="train")) == 1


def test_settings_record_everything_that_changes_the_samples(data: Callable[..., Path]) -> None:
    folder = data("data/validation-00000-of-00001", textvqa_rows())
    file = folder / "data" / "validation-00000-of-00001.parquet"
    task = open_task("textvqa", data=folder, ocr=True, post_prompt=" Short answer:")
    assert task.settings == {
        "data": {
            "files": {"validation-00000-of-00001.parquet": file.stat().st_size},
        },
        "post_prompt": " Short answer:",
        "ocr": True,
    }
    assert task[0].question == ("What is on sign 0?\nReference OCR token: STOP, 12 Short answer:")


def test_pope_s_sets_are_splits_and_categories(data: Callable[..., Path]) -> None:
    row = {"question": "Is there a dog?", "answer": "no", "image_source": "COCO_1"}
    sets = ("adversarial", "popular", "random")
    rows = [{"question_id": "1", "category": name, **row} for name in sets]
    for one in rows:
        data(f"Full/{one['category']}-00000-of-00001", [one])
    folder = data("data/test-00000-of-00001", rows)
    every = open_task("pope", data=folder)
    assert [sample.id for sample in every] == [f"{name}-1" for name in sets]
    assert [sample.category for sample in every] == list(sets)
    assert {sample.image_id for sample in every} == {"COCO_1"}
    (only,) = open_task("pope", data=folder, split="popular")
    assert (only.id, only.truth.answers) == ("popular-1", ("no",))


def test_gqa_finds_a_question_s_picture_in_the_other_table(data: Callable[..., Path]) -> None:
    image = [{"id": "n2"}, {"id": "n1"}]
    row = {"question": "Is it red?", "answer": "no", "types": {"structural": "verify"}}
    rows = [{"id": f"{n}", "imageId": f"n{n}", **row} for n in (1, 2, 3)]
    data("testdev_balanced_images/testdev-00000-of-00001", image)
    file = "testdev_balanced_instructions/testdev-00000-of-00001"
    task = open_task("gqa", data=data(file, rows, pictures=False))
    assert (task[0].picture(), task[1].picture()) == (PICTURES[1], PICTURES[0])
    assert (task[0].image_id, task[0].category) == ("n1", "verify")
    with pytest.raises(ConfigError, match="gqa: the data hold no picture n3"):
        task[2].picture()


def test_aokvqa_direct_leaves_out_questions_marked_as_too_hard(
    data: Callable[..., Path],
) -> None:
    task = open_task("aokvqa", data=data("data/validation-00000-of-00001", aokvqa_rows()))
    assert [sample.id for sample in task] == ["q0", "q2"]
    assert task[0].question == (
        "What is he waiting for?\nAnswer the question using a single word or phrase."
    )
    assert task[0].truth.answers[:4] == ("cab", "cab", "cab", "taxi")
    # The data have no ids of pictures, so the id is a digest of the picture.
    assert task[0].image_id == task[1].image_id == hashlib.sha256(JPEG).hexdigest()[:16]
    direct, vicrop = task.scorers["direct"], task.scorers["vicrop"]
    scores = [(direct(a, task[0].truth), vicrop(a, task[0].truth)) for a in ("Cab.", "bus", "one")]
    assert scores == [(1.0, pytest.approx(0.9)), (2 / 3, 0.6), (0.0, 0.0)]


def test_aokvqa_choice_asks_for_a_letter(data: Callable[..., Path]) -> None:
    rows = aokvqa_rows(direct_answers=["cab"] * 10)  # a list, as some copies have it
    task = open_task("aokvqa_mc", data=data("data/validation-00000-of-00001", rows))
    assert len(task) == 3
    assert task[0].question == (
        "What is he waiting for?\nA. bus\nB. A train\nC. cab\nD. ship\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert task[0].truth.answers == ("cab",)
    assert task[0].truth.extra == {"choices": ["bus", "A train", "cab", "ship"], "right": 2}


def test_vqav2_s_category_is_the_kind_of_answer(data: Callable[..., Path]) -> None:
    answers = [{"answer": "2", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    row = {"question_id": 7, "image_id": 9, "question": "How many?", "answers": answers}
    folder = data("data/validation-00000-of-00001", [{**row, "answer_type": "number"}])
    (sample,) = open_task("vqav2", data=folder)
    assert (sample.id, sample.image_id, sample.category) == ("7", "9", "number")
    assert sample.truth.answers == ("2",) * 10
    assert task_kind("vqav2").scorers["vqa"]("two", sample.truth) == 1.0


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "textqva"}, "no task 'textqva'; there are: textvqa, pope, gqa, aokvqa"),
        ({"name": "textvqa", "split": "test"}, "answers of 'test' are not public; there are: val"),
        ({"name": "vqav2", "split": "train"}, "vqav2: no split 'train'; there are: validation"),
        ({"name": "pope", "limit": 0}, "pope: the limit must be at least 1, not 0"),
        ({"name": "gqa", "ocr": True}, "gqa has no OCR tokens; only textvqa has"),
        ({"name": "signs", "post_prompt": " Short."}, "signs takes no post prompt"),
        ({"name": "signs", "split": "dev"}, "signs: no split 'dev'; there are: train, val, test"),
        ({"name": "signs", "limit": -1}, "signs: the limit must be at least 1, not -1"),
        ({"name": "vqav2", "data": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
    ],
)
def test_a_wrong_option_gets_one_clear_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_task(**options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_the_split_says_what_is_missing(
    data: Callable[..., Path], tmp_path: Path
) -> None:
    folder = data("data/train-00000-of-00001", textvqa_rows())
    with pytest.raises(ConfigError, match=r"no data/validation-\*\.parquet in it"):
        open_task("textvqa", data=folder)
    with pytest.raises(ConfigError, match=r"no testdev_balanced_images/testdev-\*\.parquet"):
        open_task("gqa", data=folder)


def test_rows_of_another_benchmark_are_refused_by_their_columns(
    data: Callable[..., Path],
) -> None:
    folder = data("data/validation-00000-of-00001", textvqa_rows())
    with pytest.raises(ConfigError, match="no column answer_type; there are: question_id, "):
        open_task("vqav2", data=folder)
    without = [{k: v for k, v in row.items() if k != "ocr_tokens"} for row in textvqa_rows()]
    folder = data("data/validation-00000-of-00001", without, pictures=False)
    with pytest.raises(ConfigError, match="no column ocr_tokens and no image"):
        open_task("textvqa", data=folder)


def test_a_damaged_file_gets_one_clear_line(data: Callable[..., Path]) -> None:
    folder = data("data/validation-00000-of-00001", textvqa_rows())
    file = folder / "data" / "validation-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot read .* as Parquet: ") as error:
        open_task("textvqa", data=folder)
    assert "\n" not in str(error.value)


def test_answers_that_are_not_a_list_get_one_clear_line(data: Callable[..., Path]) -> None:
    rows = aokvqa_rows(direct_answers="cab, taxi and more")
    task = open_task("aokvqa", data=data("data/validation-00000-of-00001", rows))
    with pytest.raises(ConfigError, match="'cab, taxi and more' is not a list of answers"):
        task[0]


def test_without_a_network_the_error_says_how_to_get_the_data(tmp_path: Path) -> None:
    code = "from eval.tasks import open_task; open_task('textvqa')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith(
        "vlm_collab.errors.ConfigError: cannot get lmms-lab/textvqa from the hub"
    )
    assert "hf download --repo-type dataset lmms-lab/textvqa --local-dir FOLDER" in line


def test_importing_the_tasks_needs_no_data_library() -> None:
    code = "import sys, eval.tasks; sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    folder = Path(__file__).parents[2]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=PATIENCE_S).returncode == 0
    )


@pytest.mark.parametrize("name", TASKS)
def test_scorers_are_known_without_opening_the_data(name: str) -> None:
    kind = task_kind(name)
    assert kind.name == name
    assert kind.default_scorer in kind.scorers
    assert kind.max_new_tokens > 0


def test_the_page_lists_every_task_with_its_splits_lengths_and_scorers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    listed = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]] for line in lines
    }
    assert list(listed) == list(TASKS)
    same = listed["aokvqa"]
    for name, kind in TASKS.items():
        _, data, splits, _, longest, scorers = listed[name]
        assert longest.removesuffix(" tokens") == str(kind.max_new_tokens)
        assert scorers == ", ".join(f"`{scorer}`" for scorer in kind.scorers)
        assert next(iter(kind.scorers)) == kind.default_scorer
        if issubclass(kind, HubTask):
            source = next(iter(kind.sources.values()))
            assert (same[1] if data == "the same" else data) == f"`{source.repository}`"
            documented = (same[2] if splits == "the same" else splits).replace(" (all three)", "")
            assert documented == ", ".join(kind.sources)
