"""`vlm-collab demo`: output, files, and messages for wrong use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.cli.demo import cases
from tests.support.patience import PATIENCE_S

DEMO = (str(Path(sys.executable).with_name("vlm-collab")), "demo")


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*DEMO, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output of the demo, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("demo")
    return run("--out", str(out)).stdout, out


def test_one_question_is_answered_at_once_and_one_is_corrected(shown):
    records = json.loads((shown[1] / "demo.json").read_text())
    at_once = [r for r in records if r["box"] is None]
    corrected = [
        r for r in records if r["refined"] and r["first_answer"] != r["truth"] == r["answer"]
    ]
    assert at_once
    assert all(r["answer"] == r["truth"] for r in at_once)
    assert corrected
    for record in corrected:
        assert record["region_bytes"] > 0
        assert record["first_uncertainty"] > record["uncertainty"]
    for record in records:
        assert record["original_bytes"] == Path(record["photo"]).stat().st_size
        assert 0 < record["bytes_up"] < record["original_bytes"]


def test_questions_answers_and_regions_are_printed(shown):
    printed, out = shown
    for record in json.loads((out / "demo.json").read_text()):
        assert record["question"] in printed
        assert f"{record['first_answer']}  uncertainty {record['first_uncertainty']:.3f}" in printed
        if record["box"] is not None:
            left, top, right, bottom = record["box"]
            assert f"{right - left} x {bottom - top} px at ({left}, {top})" in printed
            assert record["answer"] in printed
    assert "first answer" in printed
    assert "refined answer" in printed
    assert " kB of " in printed


def test_the_picture_shows_every_question(shown):
    with Image.open(shown[1] / "demo.png") as picture:
        assert picture.width > 1000
        assert picture.height > 300 * len(cases())


def test_it_works_on_your_own_picture(tmp_path: Path):
    photo = tmp_path / "mine.png"
    Image.effect_noise((700, 500), 60).convert("RGB").save(photo)
    line = run(str(photo), "what?", "--out", str(tmp_path), "--model", "fake", "--json").stdout
    assert json.loads(line)["photo"] == str(photo)
    assert (tmp_path / "demo.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jpg", "what?"), "missing.jpg"),
        ((__file__, "what?"), "test_demo.py"),
        (("missing.jpg",), "a picture and a question"),
        (("missing.jpg", " "), "question is empty"),
        (("--model", "no/such/model"), "no/such/model"),
        (("--out", f"{__file__}/x"), "folder"),
        (("--server", "ws://127.0.0.1:9"), "127.0.0.1:9"),
    ],
)
def test_wrong_use_gets_one_clear_line(arguments, words, tmp_path):
    folder = () if "--out" in arguments else ("--out", str(tmp_path))
    done = subprocess.run(
        [*DEMO, *arguments, *folder], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode not in (0, 130)
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
