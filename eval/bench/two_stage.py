"""Benchmark the engine against a straightforward pipeline: computing each visual token once.

Both answer the same retransmitted question about the same pictures, with the same weights:
`server_plugin.engines.two_stage` on the Transformers backend, and `eval.bench.straightforward`, a
plain implementation on transformers. Answers have a fixed length: neither side stops at the end
token. Before timing, tokens and boxes of both sides are compared; in float32 they must be equal.
(In 16-bit precision, rounding depends on matrix shapes and can decide near-ties; the share of equal
tokens is reported instead.)

Prefill is everything but token-by-token decoding. It is measured with answers of one token, which
the prefill already gives. Decoding is the additional time of a longer answer. With `first_k`, the
engine stops the first answer after k tokens; the pipeline cannot.

Each repetition times both sides of every setting one after the other, in alternating order, so
that other load slows both alike. Ratios are the pipeline's time over the engine's: medians over the
pairs, with quartiles. FLOPs are given twice: by the equations of Song and Kim, *Collaborative
Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349; visual tokens in the
decoder only), and as counted by PyTorch (vision tower, text tokens and output head included).

The last line is one JSON object. Run `python -m eval.bench.two_stage`; on a GPU, `--model
shapes-7b` uses the shapes of LLaVA-1.5-7B with random weights. `--capture` compares the first pass
with and without its attention row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval.bench.flop_count import counted, flop_counter
from eval.bench.straightforward import Straightforward, StraightforwardAnswer
from eval.bench.subjects import SHAPES, Subject, loaded_subject, random_subject, shapes_of
from eval.demo_model.provenance import provenance
from server_plugin.backends.base import Generation, GenerationRequest, ModelInfo
from server_plugin.backends.transformers.adapters.llava import LlavaAdapter
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.backends.transformers.passes import Passes
from server_plugin.engines.two_stage import Engine, RegionNeed
from server_plugin.models.presets import Preset
from vlm_collab.errors import CollabError
from vlm_collab.geometry import Box, Size
from vlm_collab.method.cost import flops, shared_prefix_flops, total_flops
from vlm_collab.method.policy import Aggregate, AlwaysPolicy

QUESTION = "what number is on the small red triangle?"
SOURCE = Size(1344, 1008)


@dataclass(frozen=True, slots=True)
class PicturePair:
    """A source picture and its global view."""

    source: Image.Image
    view: Image.Image

    @classmethod
    def random(cls, side: Size, seed: int) -> PicturePair:
        """Make blocks of random colours, so that every patch differs from its neighbours."""
        blocks = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        source = Image.fromarray(blocks).resize(SOURCE, Image.Resampling.BICUBIC)
        return cls(source, source.resize(side, Image.Resampling.BICUBIC))

    def crop(self, box: Box) -> Image.Image:
        """Cut a region and scale it to the view's size, as the edge does."""
        return self.source.crop(box).resize(self.view.size, Image.Resampling.BICUBIC)


class TwoStageSide:
    """Answers a retransmitted question with the engine, from a new view to its release."""

    def __init__(self, backend: TransformersBackend, preset: Preset, pictures: PicturePair, k: int):
        self._backend, self._preset, self._pictures, self._k = backend, preset, pictures, k

    async def answer(self, max_new_tokens: int, aggregate: Aggregate) -> StraightforwardAnswer:
        async def fetch(need: RegionNeed) -> Image.Image:
            return self._pictures.crop(need.box)

        engine = Engine(
            backend=self._backend,
            policy=AlwaysPolicy(aggregate=aggregate, k=self._k),
            ratios=self._preset.ratios,
            placement=self._preset.placement,
            max_new_tokens=max_new_tokens,
        )
        view = await self._backend.open_view(self._pictures.view)
        outcome = await engine.answer(view, SOURCE, GenerationRequest(QUESTION), fetch)
        await self._backend.release(view)
        if outcome.second is None or outcome.need is None:
            raise RuntimeError("the second stage failed; see the log")
        first = outcome.first
        return StraightforwardAnswer(
            first.token_ids, outcome.second.token_ids, outcome.need.box, first.steps
        )


class PassesWithoutCapture(Passes):
    """The model's passes without the attention row."""

    def _capture(self, *_: Any, **__: Any) -> Any:
        return None


class WithoutCapture(TransformersBackend):
    """The backend without the attention row, to measure the row's cost."""

    _passes = PassesWithoutCapture


def timed(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call. Both sides end a call by reading tokens from the device."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True, slots=True)
class AnswerSetting:
    """How a question is answered; `name` is its key in the result."""

    name: str
    tokens: int
    aggregate: Aggregate = Aggregate.FULL


class Bench:
    """Both sides on one subject."""

    def __init__(self, subject: Subject, k: int, seed: int, runner: asyncio.Runner) -> None:
        # Both sides: answers of a fixed length, which only the limit ends.
        subject.model.generation_config.eos_token_id = None
        adapter = LlavaAdapter(subject.model, subject.processor, subject.preset)
        self.backend = TransformersBackend(adapter, "bench")
        info = self.backend.info
        pictures = PicturePair.random(info.view, seed)
        self._ours = TwoStageSide(self.backend, subject.preset, pictures, k)
        self._plain = Straightforward(subject.model, subject.processor, subject.preset, info)
        self._pictures, self._k, self._runner = pictures, k, runner

    def ours(self, setting: AnswerSetting) -> StraightforwardAnswer:
        return self._runner.run(self._ours.answer(setting.tokens, setting.aggregate))

    def plain(self, setting: AnswerSetting) -> StraightforwardAnswer:
        view, crop = self._pictures.view, self._pictures.crop
        return self._plain.answer(view, SOURCE, QUESTION, crop, max_new_tokens=setting.tokens)

    def compare(self, setting: AnswerSetting) -> dict[str, Any]:
        """Run both sides once, untimed; compare their answers and count their FLOPs."""
        with counted(self.backend) as ours_counter:
            ours = self.ours(setting)
        with flop_counter() as plain_counter:
            plain = self.plain(setting)
        cut = len(ours.first) < setting.tokens
        if len(plain.first) != setting.tokens or cut != (
            setting.aggregate is Aggregate.FIRST_K and self._k < setting.tokens
        ):
            raise SystemExit(f"{setting.name}: an answer has the wrong length")
        both = [
            *zip(ours.first, plain.first, strict=False),
            *zip(ours.second, plain.second, strict=True),
        ]
        return {
            "same_box": ours.box == plain.box,
            "same_tokens": sum(a == b for a, b in both) / len(both),
            "executed": {
                "ours": ours_counter.get_total_flops(),
                "plain": plain_counter.get_total_flops(),
            },
        }

    def pairs(self, settings: Sequence[AnswerSetting], repeats: int) -> dict[str, list[Pair]]:
        """Times of both sides for each setting, one pair per repetition."""
        taken: dict[str, list[Pair]] = {setting.name: [] for setting in settings}
        rounds = [(number, setting) for number in range(repeats) for setting in settings]
        for number, setting in tqdm(rounds, desc="timing", disable=None):
            sides = [("ours", self.ours), ("plain", self.plain)]
            if number % 2:
                sides.reverse()
            times = {name: timed(partial(side, setting)) for name, side in sides}
            taken[setting.name].append(Pair(times["ours"], times["plain"]))
        return taken


class Pair(NamedTuple):
    """Seconds of the engine and of the straightforward pipeline."""

    ours_s: float
    plain_s: float


def medians(pairs: Sequence[Pair]) -> dict[str, float]:
    """Medians of both sides."""
    ours, plain = zip(*pairs, strict=True)
    return {
        "ours_s": round(statistics.median(ours), 5),
        "plain_s": round(statistics.median(plain), 5),
    }


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Medians of both sides, and quartiles of the pairs' ratios."""
    return {**medians(pairs), "ratio": quartiles([pair.plain_s / pair.ours_s for pair in pairs])}


def two_stages(bench: Bench, answers: Sequence[int], k: int, repeats: int) -> dict[str, Any]:
    """Time both sides: prefill, decoding and total, for each answer length and aggregation."""
    prefill = AnswerSetting("prefill", 1)
    full = [AnswerSetting(f"{n} tokens, full", n) for n in answers]
    early = [AnswerSetting(f"{n} tokens, first_k", n, Aggregate.FIRST_K) for n in answers]
    # An answer of at most k tokens cannot be stopped early: both aggregations are the same.
    settings = [prefill, *full, *(s for s in early if s.tokens > k)]
    compared = {
        setting.name: bench.compare(setting)
        for setting in tqdm(settings, desc="comparing", disable=None)
    }
    taken = bench.pairs(settings, repeats)
    results: dict[str, Any] = {"prefill": summary(taken["prefill"])}
    for setting in (*full, *early):
        measured = setting.name
        if setting.name not in taken:
            measured = f"{setting.tokens} tokens, full"
        total = taken[measured]
        # Time beyond the prefill of the same repetition.
        decoding = [
            Pair(*(max(a - b, 0.0) for a, b in zip(whole, start, strict=True)))
            for whole, start in zip(total, taken["prefill"], strict=True)
        ]
        shown = medians(decoding)
        if shown["ours_s"]:
            # Differences of two timings are too noisy for ratios of single pairs.
            shown["ratio_of_medians"] = round(shown["plain_s"] / shown["ours_s"], 3)
        results[setting.name] = {"total": summary(total), "decoding": shown}
    return {
        "same_boxes": all(one["same_box"] for one in compared.values()),
        "same_tokens": min(one["same_tokens"] for one in compared.values()),
        "results": results,
        "executed_gflop": {name: gflops(one["executed"]) for name, one in compared.items()},
        "equations_gflop": gflops(equations(bench.backend.info)),
    }


def equations(info: ModelInfo) -> dict[str, int]:
    """FLOPs of a retransmitted question's prefills by Song and Kim, Eq. 17; visual tokens only.

    The straightforward pipeline prefills F(n) in `generate`, F(n) under the question, F(n) under
    the generic instruction, and F(2n): 5·F(n) if attention is a small part. Eq. 20 has one F(n)
    less, because it takes the attention from the first pass.
    """
    n, width, layers = info.visual_tokens, info.hidden_size, info.layers
    return {
        "ours": shared_prefix_flops(n, n, width, layers),
        "plain": total_flops(n, width, layers, retransmitted=True) + flops(n, width, layers),
        "eq_20": total_flops(n, width, layers, retransmitted=True),
    }


def gflops(counts: dict[str, int]) -> dict[str, float]:
    """Convert FLOPs to GFLOPs and add the ratio of the two sides."""
    shown = {name: round(count / 1e9, 3) for name, count in counts.items()}
    return {**shown, "ratio": round(counts["plain"] / counts["ours"], 4)}


def _ask(
    runner: asyncio.Runner, ask: Callable[[str], Coroutine[Any, Any, Generation]], name: str
) -> Generation:
    return runner.run(ask(name))


def capture(subject: Subject, seed: int, repeats: int, runner: asyncio.Runner) -> dict[str, Any]:
    """Time the first pass with and without its attention row; one token each.

    Measures a new view (vision tower, prefix and question) and a follow-up question, which computes
    only a few text tokens.
    """
    subject.model.generation_config.eos_token_id = None
    adapter = LlavaAdapter(subject.model, subject.processor, subject.preset)
    sides = {"on": TransformersBackend(adapter, "on"), "off": WithoutCapture(adapter, "off")}
    picture = PicturePair.random(sides["on"].info.view, seed).view
    kept = {name: runner.run(backend.open_view(picture)) for name, backend in sides.items()}

    async def new_view(name: str) -> Generation:
        view = await sides[name].open_view(picture)
        first = await sides[name].first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
        await sides[name].release(view)
        return first

    async def follow_up(name: str) -> Generation:
        return await sides[name].first_pass(
            kept[name], GenerationRequest(QUESTION, max_new_tokens=1)
        )

    results = {}
    for what, ask in ("new_view", new_view), ("follow_up", follow_up):
        on, off = runner.run(ask("on")), runner.run(ask("off"))  # also the warm-up
        if on.token_ids != off.token_ids or on.row is None or off.row is not None:
            raise SystemExit(f"{what}: the first passes with and without the row do not match")
        taken: list[Pair] = []
        for number in tqdm(range(repeats), desc=what, disable=None):
            order = ["on", "off"] if number % 2 else ["off", "on"]
            times = {name: timed(partial(_ask, runner, ask, name)) for name in order}
            taken.append(Pair(times["on"], times["off"]))
        results[what] = {
            "on_s": round(statistics.median(pair.ours_s for pair in taken), 5),
            "off_s": round(statistics.median(pair.plain_s for pair in taken), 5),
            "ratio": quartiles([pair.ours_s / pair.plain_s for pair in taken]),
        }
    for backend in sides.values():
        runner.run(backend.close())
    return {"results": results}


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark with these options.

    Raises:
        SystemExit: it cannot run on this machine, or the two sides' answers differ.
    """
    gpu = torch.cuda.is_available()
    device = torch.device(
        ("cuda" if gpu else "cpu") if options.device == "auto" else options.device
    )
    name = options.model
    if name == "auto":
        name = "shapes-7b" if device.type == "cuda" else "shapes-small"
    if name == "shapes-7b" and device.type == "cpu" and not options.force:
        raise SystemExit("shapes-7b needs a GPU with 24 GB; --force tries it on the CPU")
    number = options.dtype
    if number == "auto":
        number = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, number)
    if name in SHAPES:
        subject = random_subject(SHAPES[name], device, dtype, options.seed)
    else:
        subject = loaded_subject(name, device, dtype)
    subject = replace(subject, preset=subject.preset.with_overrides(layer=options.layer))
    with asyncio.Runner() as runner:
        if options.capture:
            result = capture(subject, options.seed, options.repeats, runner)
        else:
            bench = Bench(subject, options.k, options.seed, runner)
            result = two_stages(bench, options.answers, options.k, options.repeats)
            runner.run(bench.backend.close())
            exact = result["same_boxes"] and result["same_tokens"] == 1.0
            if dtype is torch.float32 and not exact:
                raise SystemExit(f"the two sides disagree: {json.dumps(result)}")
    return {
        "benchmark": "row capture" if options.capture else "two stages",
        "model": name,
        "shapes": shapes_of(subject),
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "dtype": number,
        "repeats": options.repeats,
        **result,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="auto", help=f"{', '.join(SHAPES)}, or a LLaVA checkpoint's folder"
    )
    parser.add_argument("--layer", type=int, help="decoder layer, from 0, that is read")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 20], help="lengths, tokens")
    parser.add_argument("--k", type=int, default=5, help="tokens that first_k decides on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capture", action="store_true", help="time the attention row instead")
    parser.add_argument("--force", action="store_true", help="7B shapes without a GPU")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if min(options.answers) < 2 or min(options.k, options.repeats) < 1:
        parser.error("--answers must be at least 2, --k and --repeats at least 1")
    try:
        result = measure(options)
    except CollabError as error:
        raise SystemExit(str(error)) from error
    command = " ".join(["python -m eval.bench.two_stage", *(arguments or sys.argv[1:])])
    result["made_by"] = {**provenance("bench_two_stage"), "command": command}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
