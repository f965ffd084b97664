"""The benchmark on a tiny model: both sides give the same answers, and its figures are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.bench import subjects
from eval.bench import two_stage as bench_two_stage
from eval.bench.straightforward import Straightforward
from server_plugin.backends.base import ModelInfo
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from vlm_collab.geometry import Fit, Grid, Size
from vlm_collab.method.cost import flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"), TinyLlava())


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    bench_two_stage.main([*arguments, "--layer", "1", "--repeats", "2", "--device", "cpu"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_both_sides_answer_alike_and_everything_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    result = run(
        capsys, "--model", str(folder), "--answers", "3", "8", "--k", "4", "--out", str(out)
    )
    assert json.loads(out.read_text()) == result
    assert (result["same_boxes"], result["same_tokens"]) == (True, 1.0)
    assert set(result["results"]) == {
        "prefill", "3 tokens, full", "3 tokens, first_k", "8 tokens, full", "8 tokens, first_k",
    }  # fmt: skip
    # An answer of three tokens ends before `first_k` with k = 4 decides.
    assert result["results"]["3 tokens, first_k"] == result["results"]["3 tokens, full"]
    executed = result["executed_gflop"]
    assert executed["8 tokens, first_k"]["ours"] < executed["8 tokens, full"]["ours"]
    assert executed["8 tokens, first_k"]["plain"] == executed["8 tokens, full"]["plain"]
    for one in executed.values():
        assert one["ratio"] > 1.5
    for one in (result["results"]["prefill"], result["results"]["8 tokens, full"]["total"]):
        ratio = one["ratio"]
        assert one["ours_s"] > 0
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert result["made_by"]["command"].startswith("python -m eval.bench.two_stage --model")


def test_shapes_need_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = subjects.Shapes(
        layers=2, hidden=64, intermediate=172, heads=2, vocabulary=700, layer=1,
        vision_layers=2, vision_hidden=32, vision_heads=2,
    )  # fmt: skip
    monkeypatch.setitem(subjects.SHAPES, "shapes-small", shapes)
    result = run(capsys, "--answers", "2")
    assert (result["model"], result["shapes"]["hidden"]) == ("shapes-small", 64)
    assert result["equations_gflop"]["eq_20"] > 0
    assert (result["same_boxes"], result["same_tokens"]) == (True, 1.0)


def test_a_pipeline_with_other_answers_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark compares the answers of both sides."""
    row = Straightforward._row

    def reversed_row(self: Straightforward, *arguments: Any) -> Any:
        return row(self, *arguments)[::-1] if "what" in arguments[0] else row(self, *arguments)

    monkeypatch.setattr(Straightforward, "_row", reversed_row)
    with pytest.raises(SystemExit, match="disagree"):
        run(capsys, "--model", str(folder), "--answers", "2")


def test_passes_with_and_without_the_row_are_timed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "--model", str(folder), "--capture")
    assert set(result["results"]) == {"new_view", "follow_up"}
    for one in result["results"].values():
        assert one["ratio"]["median"] > 0


def test_the_equations_count_five_prefills_against_two() -> None:
    info = ModelInfo(
        name="7b", view=Size(336, 336), fit=Fit.CROP, grid=Grid(24, 24), base_px=336, layer=14,
        hidden_size=4096, layers=32, visual_tokens=576, context_tokens=4096,
    )  # fmt: skip
    counted, one = bench_two_stage.equations(info), flops(576, 4096, 32)
    assert counted["plain"] / one == pytest.approx(5, rel=0.02)
    assert counted["eq_20"] / one == pytest.approx(4, rel=0.02)
    assert counted["ours"] / one == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "shapes-7b"), "shapes-7b needs a GPU"),
        (("--model", "no/such/folder/here"), "there is no model folder"),
    ],
)
def test_impossible_options_give_one_line(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit, match=words) as caught:
        bench_two_stage.main([*arguments, "--device", "cpu"])
    assert "\n" not in str(caught.value)
