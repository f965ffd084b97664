"""The examples run unchanged, against a real service if they need one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest

import edge_client
from tests.support.patience import PATIENCE_S
from tests.support.process import serving
from vlm_collab_demo import PICTURES

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
OPENAI_EDGE = EXAMPLES / "openai_edge.py"
PHOTO, QUESTION = PICTURES / "scene-2.jpg", "what number is on the white diamond?"


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, object]]:
    """The line that a service with the demo model prints when it is ready."""
    with serving() as (_, line):
        yield line


@pytest.fixture
def base_url(ready: dict[str, object]) -> str:
    """OpenAI's APIs of the service."""
    return str(ready["openai"])


def output(script: Path, *arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run a script and return its output."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=cwd,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(base_url: str, *arguments: str) -> str:
    return output(OPENAI_EDGE, *arguments, OPENAI_BASE_URL=base_url)


@pytest.mark.parametrize("role", ["sure", "asks"])
def test_openai_edge_refines_only_unsure_answers(base_url, role):
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


def test_the_documentation_shows_the_output_of_openai_edge(base_url):
    """JPEG sizes may differ a little, as they do between versions of the library."""
    page = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    command, expected = re.search(
        r"\npython examples/openai_edge.py ([^\n]+)\n```\n\n```\n(.+?)\n```", page, re.DOTALL
    ).groups()
    file, question = shlex.split(command)
    answer, cost = run(base_url, str(ROOT / file), question).splitlines()
    expected_answer, expected_cost = expected.splitlines()
    assert answer == expected_answer
    assert re.sub(r"\d+", "#", cost) == re.sub(r"\d+", "#", expected_cost)
    sizes, expected_sizes = (
        list(map(int, re.findall(r"\d+", line))) for line in (cost, expected_cost)
    )
    assert sizes == pytest.approx(expected_sizes, rel=0.03)


def test_openai_edge_is_short():
    """It has at most 36 lines of code after its imports, as the documentation says."""
    code = OPENAI_EDGE.read_text(encoding="utf-8").partition("TOOL =")[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 36


def test_ask_prints_answers_and_bytes(ready: dict[str, object]) -> None:
    url = str(ready["url"])
    arguments = (str(PHOTO), QUESTION, "how many signs are there?", "--server", url)
    lines = output(EXAMPLES / "ask.py", *arguments).splitlines()
    assert lines[0] == f"{QUESTION} 10"
    assert lines[1].startswith("  looked again at ")
    costs = [int(found[1]) for line in lines if (found := re.search(r"(\d+) bytes sent", line))]
    assert costs[1] < costs[0] / 2  # no view the second time


def test_own_backend_answers_like_the_built_in_one(ready: dict[str, object]) -> None:
    expected = edge_client.ask(PHOTO, QUESTION, server=str(ready["url"]))
    answer, _ = output(EXAMPLES / "own_backend.py", str(PHOTO), QUESTION).splitlines()
    assert answer == f"plain: {expected.text} (first answer: {expected.first_text})"


def test_own_adapter_makes_a_second_pass() -> None:
    line = output(EXAMPLES / "own_adapter.py", str(PHOTO), QUESTION)
    assert re.fullmatch(r"tiny-vipllava: looked at Box\(.+\), sent \d+ bytes\n", line)


def test_the_notebook_draws_a_curve(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    jupytext.write(jupytext.read(EXAMPLES / "trade_off.ipynb"), script, fmt="py:percent")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    run_folder = str(ROOT / "docs/results/demo/runs/test")
    text = output(script, cwd=tmp_path, RUN=run_folder, MPLBACKEND="agg", PATH=path)
    assert re.search(r"^threshold \d\.\d{3} bits: \d+% of the regions sent$", text, re.MULTILINE)
    assert (tmp_path / "trade-off.png").stat().st_size > 10_000


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "trade_off.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_the_list_of_examples_is_complete() -> None:
    listed = re.findall(r"\| \[`([^`]+)`\]", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(listed) == sorted(files)
