"""The examples of the documentation, run as they stand against a real service."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.process import serving
from vlm_collab_demo import PICTURES

ROOT = Path(__file__).resolve().parent.parent
OPENAI_EDGE = ROOT / "docs" / "examples" / "openai_edge.py"


@pytest.fixture(scope="module")
def base_url():
    """Of a service with the demo model."""
    with serving() as (_, ready):
        yield str(ready["openai"])


def run(base_url: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(OPENAI_EDGE), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OPENAI_BASE_URL": base_url},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("role", ["sure", "asks"])
def test_the_sdk_is_the_edge(base_url, role):
    listed = json.loads((PICTURES / "pictures.json").read_text(encoding="utf-8"))["pictures"]
    case = next(one for one in listed if one["role"] == role)
    photo = PICTURES / case["file"]
    answer, cost = run(base_url, str(photo), case["question"]).splitlines()
    text, first = re.fullmatch(r"(\d+) \(first answer: (\d+)\)", answer).groups()
    assert text == case["truth"]
    assert (first == text) == (role == "sure")
    sent, instead = map(int, re.findall(r"\d+", cost))
    assert instead >= photo.stat().st_size
    assert 1000 < sent < instead / 5


def test_the_documentation_shows_what_it_prints(base_url):
    """But for the sizes of JPEGs, which differ a little between versions of its library."""
    page = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    command, shown = re.search(
        r"\npython docs/examples/openai_edge.py ([^\n]+)\n```\n\n```\n(.+?)\n```", page, re.DOTALL
    ).groups()
    file, question = shlex.split(command)
    answer, cost = run(base_url, str(ROOT / file), question).splitlines()
    expected_answer, expected_cost = shown.splitlines()
    assert answer == expected_answer
    assert re.sub(r"\d+", "#", cost) == re.sub(r"\d+", "#", expected_cost)
    told, expected = (list(map(int, re.findall(r"\d+", line))) for line in (cost, expected_cost))
    assert told == pytest.approx(expected, rel=0.03)


def test_the_example_is_short():
    """As its documentation says; lines of code, after imports."""
    code = OPENAI_EDGE.read_text(encoding="utf-8").partition("TOOL =")[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 36
