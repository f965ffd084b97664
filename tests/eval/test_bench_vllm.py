"""The benchmark of rows in vLLM: how it evaluates times. The engines are stand-ins."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.bench import vllm as bench
from tests.support.vllm_cpu import environment


def test_a_ratio_divides_times_of_the_same_round() -> None:
    times = {
        "rows": [2.0, 4.0, 8.0],
        "captured": [1.0, 2.0, 4.0],
        "plain": [1.0, 2.0, 4.0],
        "statistics": [1.5, 3.0, 6.0],
        "control": [2.0, 4.0, 8.0],
    }
    result = bench.compared(times)
    assert result["median_s"]["rows"] == 4.0
    expected = {"plain": 0.5, "statistics": 0.75, "control": 1.0}
    for other, ratio in expected.items():
        held = {"median": ratio, "low": ratio, "high": ratio, "interval": [ratio, ratio]}
        assert result[f"{other}_over_rows"] == held
        assert result[f"{other}_over_captured"]["median"] == 2 * ratio
    assert result["plain_over_control"]["median"] == 0.5


def test_an_interval_holds_the_true_median_nearly_always_and_narrows_with_rounds() -> None:
    draw = np.random.default_rng(1)
    hits, widths = 0, {12: 0.0, 48: 0.0}
    for rounds in widths:
        for _ in range(60):
            low, high = bench.interval(list(draw.normal(0.96, 0.05, rounds)))
            hits += low <= 0.96 <= high
            widths[rounds] += high - low
    assert hits >= 0.9 * 120
    assert 1.6 < widths[12] / widths[48] < 2.6  # the root of 4


@pytest.mark.parametrize(
    ("ends", "word"),
    [
        ([0.97, 1.02], "met"),
        ([0.90, 0.9699], "missed"),
        ([0.95, 0.98], "undecided"),
        ([0.95, 0.97], "undecided"),
    ],
)
def test_the_goal_is_met_or_missed_only_by_the_whole_interval(ends: list[float], word: str) -> None:
    ratio = {"median": 0.97, "interval": ends}
    assert bench.verdict(ratio, 12) == word
    assert bench.verdict(ratio, 11) == "undecided"


class Stand:
    """Stands for either engine: its answer depends on the picture, and it records all pictures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: dict[str, list[bytes]] = {"ours": [], "plain": []}
        self.wrong = ""
        self.engine = "ours"
        self.info = SimpleNamespace(view=SimpleNamespace(width=8))
        monkeypatch.setattr(bench, "ours", self.of_ours)
        monkeypatch.setattr(bench, "plain", self.of_plain)
        monkeypatch.setattr(bench, "cpu_s", lambda processes: time.perf_counter())

    def of_ours(self, backend: Any, new_tokens: int, *, fetched: bool) -> bench.Way:
        return self.way("ours", "rows" if fetched else "captured")

    def of_plain(
        self, engine: str, adapter: Any, new_tokens: int, logprobs: int | None
    ) -> bench.Way:
        return self.way(engine, "control" if engine == "ours" else f"plain {logprobs}")

    def way(self, engine: str, name: str) -> bench.Way:
        async def one(picture: Image.Image) -> tuple[int, ...]:
            self.shown[engine].append(picture.tobytes())
            return (picture.tobytes()[0] + (name == self.wrong),)

        return one

    async def warm_up(self) -> None: ...

    async def close(self) -> None: ...

    async def measure(self) -> dict[str, Any]:
        options = argparse.Namespace(rounds=4, warm_up=1, questions=3, together=2, new_tokens=8)
        return await bench.measure(self, "plain", None, {"ours": [], "plain": []}, options)


@pytest.mark.parametrize("fetched", [True, False])
async def test_only_one_way_fetches_the_rows(fetched: bool) -> None:
    called: list[str] = []

    class Backend:
        def __getattr__(self, name: str) -> Any:
            async def call(*_: Any, **__: Any) -> Any:
                called.append(name)
                return SimpleNamespace(token_ids=[1])

            return call

    assert await bench.ours(Backend(), 8, fetched=fetched)(Image.new("RGB", (8, 8))) == (1,)
    assert called == ["open_view", "first_pass", *(["row_of"] if fetched else []), "release"]


async def test_no_engine_is_shown_a_picture_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches would contain the picture, and the measured time would be too short."""
    stand = Stand(monkeypatch)
    result = await stand.measure()
    assert len(stand.shown["ours"]) == 3 * 3 * 5
    assert len(stand.shown["plain"]) == 3 * (2 * 5 + 1)
    for pictures in stand.shown.values():
        assert len(set(pictures)) == len(pictures)
    assert set(result["goal"]) == {"plain_over", "rows", "captured"}
    assert set(result["elapsed"]) == set(result["cpu"])


@pytest.mark.parametrize("way", ["rows", "captured", "control", "plain 2", "plain None"])
async def test_differing_answers_end_the_benchmark(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    stand.wrong = way
    with pytest.raises(SystemExit, match="same answers"):
        await stand.measure()


def test_the_command_of_a_result_works_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    for name in bench.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{here}/tests/support/vllm_cpu:{here}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_API_KEY", "a secret")
    monkeypatch.setattr(sys, "executable", f"{here}/.venv-vllm/bin/python")
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "a b", "--rounds", "3"])
    words = shlex.split(bench.command())
    assert words == [
        *("PYTHONPATH=tests/support/vllm_cpu:.", "OMP_NUM_THREADS=1"),
        *(".venv-vllm/bin/python", "-m", "eval.bench.vllm"),
        *("--model", "a b", "--rounds", "3"),
    ]


def test_a_module_runs_in_the_environment_with_its_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    became: list[Any] = []
    monkeypatch.setattr(environment, "ensure", lambda: Path("/there/python"))
    monkeypatch.setattr(os, "execve", lambda *arguments: became.extend(arguments))
    environment.main([])
    assert not became
    environment.main(["eval.bench.vllm", "--rounds", "3"])
    path, command, variables = became
    assert path == "/there/python"
    assert command == ["/there/python", "-m", "eval.bench.vllm", "--rounds", "3"]
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert str(environment.SUPPORT) in variables["PYTHONPATH"]
