"""The vLLM backend against the Transformers backend: same checkpoint, same numbers.

Run with `pytest -m vllm tests/server_plugin/vllm`; see `tests/support/vllm_cpu`. Both backends
run in that environment, so that they use the same image processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from server_plugin.backends.open import demo_folder
from server_plugin.models.presets import preset_named
from tests.support.oracle import picture
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from tests.support.tiny_qwen import TinyQwen, save_tiny_qwen
from tests.support.vllm_cpu.environment import drive
from vlm_collab.geometry import Fit, Size, frame_of
from vlm_collab.method.roi import find_region

PAIRS = 30
NEW_TOKENS = 8
BLOCK = 32
SOURCES = (Size(640, 480), Size(1200, 90), Size(70, 900), Size(112, 112), Size(2400, 1800))
QUESTIONS = (
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
    "Read it!",
    "what   is\n0123456789 é ∑ 字?",
    "a" * 60,
    "what does the tiny sign at the left say {question} {0}",
)
# Heads of width 32, the smallest that vLLM's CPU kernels support.
LLAVA = TinyLlava(hidden=128, key_value_heads=2, end_tokens=(2, 44, 202, 8), seed=1)
QWEN = TinyQwen(hidden=128, key_value_heads=2, mrope_section=(4, 6, 6), seed=2)
MODELS = {
    "llava": ("demo", {"layer": 2, "base_px": 112, "epsilon": 0.0}),
    "demo": ("demo", {"metric": "entropy"}),
    "qwen": ("qwen2.5-vl", {"layer": 2}),
}
SETUPS: dict[str, dict[str, Any]] = {
    "prefixes": {},
    # 40 tokens per step: prompts of 80 tokens and more are computed in chunks. A step has chunks of
    # several requests, some of a single token.
    "chunks": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 8,
    },
    "chunked prefixes": {"max_num_batched_tokens": 40, "max_num_seqs": 8},
    "compiled": {"enforce_eager": False},
    # Each has half of the heads.
    "two ranks": {"tensor_parallel_size": 2},
    # Room for one longest request: other requests lose their blocks and restart.
    "too few blocks": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 8,
        "max_model_len": 320,
        "num_gpu_blocks_override": 11,
        "scheduler_reserve_full_isl": False,
    },
}
OFTEN = {("llava", "too few blocks"), ("qwen", "chunked prefixes")}
"""What `make test` runs; the others are marked `slow`."""

CASES = [
    pytest.param(
        model,
        setup,
        # A model's cases share the Transformers backend's answers.
        marks=[
            pytest.mark.xdist_group(model),
            *([] if (model, setup) in OFTEN else [pytest.mark.slow]),
        ],
    )
    for model in MODELS
    for setup in SETUPS
    if model == "llava" or setup in ("prefixes", "chunks", "chunked prefixes")
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Questions, by model."""
    root = tmp_path_factory.mktemp("vllm")
    folders = {
        "llava": in_hub_names(save_tiny_llava(root / "llava", LLAVA)),
        "demo": demo_folder(),
        "qwen": save_tiny_qwen(root / "qwen", QWEN),
    }
    return {
        name: {
            "checkpoint": str(folders[name]),
            "preset": preset,
            "overrides": {**overrides, "max_new_tokens": NEW_TOKENS},
            "pairs": pairs(root, name, preset),
        }
        for name, (preset, overrides) in MODELS.items()
    }


def in_hub_names(folder: Path) -> Path:
    """Give a checkpoint's vision tower the names that the hub's files have; vLLM knows no other."""
    path = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def pairs(root: Path, name: str, preset: str) -> list[dict[str, str]]:
    side = preset_named(preset).view_px or (224 if name == "qwen" else 112)
    made = []
    for number in range(PAIRS):
        source = picture(number, SOURCES[number % len(SOURCES)])
        files = [root / f"{name}-{number}-{part}.png" for part in ("view", "region")]
        source.resize((side, side), Image.Resampling.BICUBIC).save(files[0])
        # Any shape and size: resizing to the encoder's input is compared too.
        width, height = source.size
        source.crop((width // 4, height // 3, width, height)).save(files[1])
        question = QUESTIONS[(number + number // 6) % len(QUESTIONS)]
        made.append({"view": str(files[0]), "region": str(files[1]), "question": question})
    return made


@pytest.fixture(scope="module")
def expected(jobs: dict[str, dict[str, Any]]) -> Callable[[str], list[dict[str, Any]]]:
    """Return the Transformers backend's answers for a model, asked one at a time."""

    @cache
    def of(model: str) -> list[dict[str, Any]]:
        job = {**jobs[model], "backend": "transformers", "engine": {}, "together": [1]}
        answers: list[dict[str, Any]] = drive(job)["answers"][0]
        return answers

    return of


@pytest.mark.vllm
@pytest.mark.parametrize(("model", "setup"), CASES)
def test_rows_boxes_and_answers_are_the_same(
    model: str,
    setup: str,
    jobs: dict[str, dict[str, Any]],
    expected: Callable[[str], list[dict[str, Any]]],
) -> None:
    engine = {"enforce_eager": True, "max_model_len": 512, **SETUPS[setup]}
    job = {**jobs[model], "backend": "vllm", "engine": engine, "together": [1, 8]}
    result = drive(job)
    alone, together = result["answers"]
    assert (result["preemptions"] > 0) == (setup == "too few blocks")
    exact_entropy = jobs[model]["overrides"].get("metric") == "entropy"
    assert len(alone) == len(together) == PAIRS
    for number, wanted in enumerate(expected(model)):
        compare(alone[number], wanted, number, exact_entropy)
        compare(together[number], wanted, number, exact_entropy)
        if setup in ("prefixes", "compiled", "two ranks"):
            check_sharing(alone[number])
        elif setup == "chunks":
            assert alone[number]["second"]["prefilled"] == alone[number]["second"]["context"]
    assert result["left"]["ids"] == expected(model)[0]["first"]["ids"]
    np.testing.assert_allclose(
        result["left"]["row"], expected(model)[0]["first"]["row"], rtol=1e-3, atol=0
    )
    check_it_could_fail(expected(model))


INTERLEAVED = [
    ("Image 1:\nImage 2:\nwhich is larger?", [], [[0, 8, 0], [0, 17, 1]], 0),
    ("compare  with  and again ", [], [[0, 8, 0], [0, 14, 1], [0, 25, 0]], 1),
    ("and here? USER: <image> </s>", [["what is this?", "a bus"]], [[0, 0, 0], [1, 0, 1]], 1),
]


@pytest.mark.vllm
@pytest.mark.parametrize("model", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_pictures_among_texts_are_the_same(model: str, jobs: dict[str, dict[str, Any]]) -> None:
    some = jobs[model]["pairs"]
    asked = [
        {
            "views": [some[number]["view"], some[number + 3]["view"]],
            "region": some[number]["region"],
            "question": question,
            "history": history,
            "places": places,
            "picture": picture,
        }
        for number, (question, history, places, picture) in enumerate(INTERLEAVED)
    ]
    job = {**jobs[model], "pairs": some[:1], "together": [1], "interleaved": asked}
    engine = {
        "enforce_eager": True,
        "max_model_len": 512,
        "limit_mm_per_prompt": {"image": 4},
    }
    wanted, got = (
        drive({**job, "backend": backend, "engine": engine})["interleaved"]
        for backend in ("transformers", "vllm")
    )
    assert len(got) == len(wanted) == len(INTERLEAVED)
    for answer, other in zip(got, wanted, strict=True):
        for part in ("first", "second"):
            for key in ("ids", "text", "ended", "context"):
                assert answer[part][key] == other[part][key]
        np.testing.assert_allclose(answer["first"]["row"], other["first"]["row"], rtol=1e-3)
        np.testing.assert_allclose(answer["maps"], other["maps"], rtol=1e-3)


def compare(got: dict[str, Any], wanted: dict[str, Any], number: int, exact_entropy: bool) -> None:
    for part in ("first", "second", "cut"):
        for key in ("ids", "text", "ended", "context"):
            assert got[part][key] == wanted[part][key], f"{part} {key}, pair {number}"
        steps, expected_steps = np.array(got[part]["steps"]), np.array(wanted[part]["steps"])
        if not exact_entropy:
            # Two probabilities are not enough for the entropy, which then is NaN.
            assert np.isnan(steps[:, 1]).all()
            expected_steps[:, 1] = np.nan
        np.testing.assert_allclose(steps, expected_steps, rtol=0, atol=1e-4)
    assert got["texts"] == wanted["texts"]
    assert got["cut"]["ids"] == got["first"]["ids"][:2]
    for part in ("first", "cut"):
        np.testing.assert_allclose(got[part]["row"], wanted[part]["row"], rtol=1e-3, atol=0)
    np.testing.assert_allclose(got["map"], wanted["map"], rtol=1e-3, atol=0)
    source = SOURCES[number % len(SOURCES)]
    frame = frame_of(source, Fit.STRETCH, Size(112, 112))
    boxes = [find_region(np.array(answer["map"]), frame, 112) for answer in (got, wanted)]
    assert boxes[0] == boxes[1], f"pair {number}"
    assert got["generic_again"] == [0, 0], "the generic row was computed twice for a view"


def check_sharing(answer: dict[str, Any]) -> None:
    """Every pass but the first takes the view's whole blocks from the cache."""
    visual = len(answer["first"]["row"])
    whole_blocks = visual // BLOCK * BLOCK
    for prefilled, context in (
        answer["generic"],
        (answer["second"]["prefilled"], answer["second"]["context"]),
        (answer["cut"]["prefilled"], answer["cut"]["context"]),
    ):
        assert context - prefilled >= whole_blocks


def check_it_could_fail(answers: list[dict[str, Any]]) -> None:
    """Rows are peaked and differ from pair to pair, and so do the answers."""
    rows = np.array([answer["first"]["row"] for answer in answers])
    assert (rows.max(1) > 2 * rows.mean(1)).all()
    assert all(
        not np.allclose(rows[i], rows[j], rtol=1e-2, atol=0)
        for i in range(len(rows))
        for j in range(i)
    )
    assert len({tuple(answer["first"]["ids"]) for answer in answers}) > math.isqrt(len(answers))
