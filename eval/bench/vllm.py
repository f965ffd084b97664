"""Benchmark the cost of attention rows in vLLM: first passes with rows against plain requests.

This process starts two engines of vLLM: one with the plugin, used through `VllmBackend`, and one
without plugins, used through vLLM's own interface. Both get the same prompts and the same new
pictures, many at a time, in five ways:

- `rows`: first passes whose rows are fetched, as if every question needed a region.
- `captured`: first passes whose rows are captured and released unread: no question needs a region.
- `plain`: plain requests to the engine without the plugin.
- `statistics`: the same with the log-probabilities that uncertainty needs; the remaining difference
  is the cost of the row alone.
- `control`: plain requests to the engine with the plugin. Two engines never perform exactly alike;
  compared with the control, the rows' cost is measured within one engine.

Each round times all ways, in random order, so that other load slows all alike. A ratio is the time
of another way over that of `rows` or `captured`, which is their relative throughput; 1 means no
cost.
For each ratio, the result has the median over the rounds with quartiles, and a 95 % bootstrap
interval of the median over rounds: for the elapsed time, and for the processor time of front-end,
engine and worker, which depends less on other load. (It still does: vLLM's engine process spins
while it waits for its worker.) The goal is met if the whole interval of the elapsed time's ratio of
`plain` lies above it, missed if it lies below, and undecided otherwise or after too few rounds.
Tokens of the ways are compared in each round (those of `captured` only during warm-up), and must be
equal in float32.

The last line is one JSON object. Run `python -m eval.bench.vllm` where vLLM is installed, or
`make bench-vllm`, which installs it for the CPU first (docs/vllm.md).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.bench.subjects import SHAPES, random_subject
from eval.bench.two_stage import machine, quartiles
from eval.demo_model.provenance import provenance
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import checkpoint_of, preset_of
from server_plugin.backends.vllm.model import (
    check,
    engine_options,
    open_vllm_model,
    weightless_adapter,
)
from server_plugin.backends.vllm.setup import require_vllm
from server_plugin.models.presets import Preset
from server_plugin.vllm_server.launch import PLUGIN
from vlm_collab.errors import CollabError

QUESTION = "what is written on the large red sign?"
GOAL = 0.97
RESAMPLES = 10_000
FEWEST_ROUNDS = 12
"""With fewer rounds, bootstrap intervals are too narrow."""
GIB = 2**30
# Environment variables that a result on the CPU depends on.
VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")

Tokens = tuple[int, ...]
Way = Callable[[Image.Image], Awaitable[Tokens]]


def pictures(count: int, side: int, seed: int) -> list[Image.Image]:
    """Make views that differ between seeds, so that no cache contains them."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small]


def ours(backend: Any, new_tokens: int, *, fetched: bool) -> Way:
    """First passes through our backend: token statistics, and the row, fetched or not."""

    async def one(picture: Image.Image) -> Tokens:
        view = await backend.open_view(picture)
        first = await backend.first_pass(
            view, GenerationRequest(QUESTION, max_new_tokens=new_tokens)
        )
        if fetched:
            await backend.row_of(first)
        await backend.release(view)
        return tuple(first.token_ids)

    return one


def plain(engine: Any, adapter: Any, new_tokens: int, logprobs: int | None) -> Way:
    """Plain requests through vLLM's own interface."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        logprobs=logprobs,
        ignore_eos=True,
        stop_token_ids=sorted(adapter.end_tokens),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    numbers = itertools.count()

    async def one(picture: Image.Image) -> Tokens:
        # As in our backend, each request starts from text.
        prompt = adapter.prompts.build(GenerationRequest(QUESTION, max_new_tokens=new_tokens), 1)
        (place,) = prompt.images
        ids = [*prompt.ids[: place.start + 1], *prompt.ids[place.stop :]]
        request = {"prompt_token_ids": ids, "multi_modal_data": {"image": [picture]}}
        (rendered,) = await engine.renderer.render_cmpl_async([request])
        tokens: list[int] = []
        async for output in engine.generate(rendered, params, f"{logprobs}-{next(numbers)}"):
            tokens += output.outputs[0].token_ids
        adapter.text_of(tokens)  # as in our backend
        return tuple(tokens)

    return one


async def ask_all(way: Way, views: Sequence[Image.Image], together: int) -> list[Tokens]:
    """Ask about all pictures in one way; keep `together` requests in flight."""
    gate = asyncio.Semaphore(together)

    async def one(view: Image.Image) -> Tokens:
        async with gate:
            return await way(view)

    return await asyncio.gather(*map(one, views))


async def measure(
    backend: Any,
    engine: Any,
    adapter: Any,
    workers: dict[str, list[psutil.Process]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time all ways, round by round.

    Args:
        workers: processes of each engine, "ours" and "plain".
    """
    await backend.warm_up()
    ways = {
        "rows": ours(backend, options.new_tokens, fetched=True),
        "captured": ours(backend, options.new_tokens, fetched=False),
        "plain": plain(engine, adapter, options.new_tokens, None),
        "statistics": plain(engine, adapter, options.new_tokens, 2),
        "control": plain(backend.engine, adapter, options.new_tokens, None),
    }
    # Ways that share an engine get different pictures, so that its caches contain none of them.
    shown = {"rows": 0, "plain": 0, "control": 1, "statistics": 1, "captured": 2}
    side = backend.info.view.width
    wall: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for number in range(-options.warm_up, options.rounds):
        sets = [
            pictures(options.questions, side, 3 * (number + options.warm_up) + which)
            for which in range(3)
        ]
        answers: dict[str, list[Tokens]] = {}
        for name in draw.sample(list(ways), len(ways)):
            processes = [
                psutil.Process(),
                *workers["plain" if name in ("plain", "statistics") else "ours"],
            ]
            began, before = time.perf_counter(), cpu_s(processes)
            answers[name] = await ask_all(ways[name], sets[shown[name]], options.together)
            if number >= 0:
                wall[name].append(time.perf_counter() - began)
                work[name].append(cpu_s(processes) - before)
        if number < 0:
            answers["same"] = await ask_all(ways["plain"], sets[2], options.together)
        if (
            answers["rows"] != answers["plain"]
            or answers["control"] != answers["statistics"]
            or answers.get("same", answers["captured"]) != answers["captured"]
        ):
            raise SystemExit("the two engines do not give the same answers")
    await backend.close()
    elapsed = compared(wall)
    return {
        "goal": {
            "plain_over": GOAL,
            **{
                way: verdict(elapsed[f"plain_over_{way}"], options.rounds)
                for way in ("rows", "captured")
            },
        },
        "elapsed": elapsed,
        "cpu": compared(work),
    }


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the ways' times in seconds, and ratios of times of the same round."""
    result: dict[str, Any] = {
        "median_s": {name: round(float(np.median(taken)), 4) for name, taken in times.items()}
    }
    pairs = [
        (one, way) for way in ("rows", "captured") for one in ("plain", "statistics", "control")
    ]
    for one, other in (*pairs, ("plain", "control")):
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        result[f"{one}_over_{other}"] = {**quartiles(ratios), "interval": interval(ratios)}
    return result


def interval(ratios: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the median over the rounds."""
    draw = np.random.default_rng(0)
    resampled = draw.choice(np.asarray(ratios), (RESAMPLES, len(ratios)))
    return [round(float(end), 4) for end in np.percentile(np.median(resampled, 1), (2.5, 97.5))]


def verdict(ratio: dict[str, Any], rounds: int) -> str:
    """Whether a ratio meets the goal: "met", "missed" or "undecided"."""
    low, high = ratio["interval"]
    if rounds < FEWEST_ROUNDS:
        return "undecided"
    return "met" if low >= GOAL else "missed" if high < GOAL else "undecided"


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Processor time that the processes have used so far, in seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def saved_shapes(name: str, folder: Path) -> str:
    """Save a random checkpoint of these shapes in a folder."""
    subject = random_subject(SHAPES[name], torch.device("cpu"), torch.float32, seed=0)
    subject.model.save_pretrained(folder)
    subject.processor.save_pretrained(folder)
    # vLLM expects the names of the hub's checkpoints, which the newest transformers shortens.
    (weights,) = folder.glob("*.safetensors")
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(weights).items()
    }
    save_file(named, weights, {"format": "pt"})
    return str(folder)


def run(source: str, preset: Preset, options: argparse.Namespace) -> dict[str, Any]:
    """Open both engines with a checkpoint, and measure."""
    require_vllm()
    check(source, preset, options.model)
    engine = {
        "enforce_eager": not options.compile,
        "max_model_len": options.max_model_len,
        # for each of the two engines
        "kv_cache_memory_bytes": int(options.kv_cache_gib * GIB),
        "gpu_memory_utilization": 0.45,
    }
    # An engine's processes read this when they start.
    os.environ["VLLM_PLUGINS"] = ""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {"model": source, **engine_options(preset), **engine}
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    bare = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        theirs = psutil.Process().children(recursive=True)
        os.environ["VLLM_PLUGINS"] = PLUGIN
        backend = open_vllm_model(source, preset, engine=engine)
        adapter = weightless_adapter(
            check(source, preset, options.model), source, preset, bare.model_config.max_model_len
        )
        known = {process.pid for process in theirs}
        workers = {
            "plain": [one for one in theirs if one.pid not in before],
            "ours": [one for one in psutil.Process().children(True) if one.pid not in known],
        }
        cache = (
            bare.vllm_config.cache_config.kv_cache_memory_bytes / GIB
        )  # the environment may set it
        return {
            "kv_cache_gib": round(cache, 3),
            **asyncio.run(measure(backend, bare, adapter, workers, options)),
        }
    finally:
        bare.shutdown()


def command() -> str:
    """Shell command that repeats the run in this folder, with the environment variables."""
    words = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    words += [sys.executable, "-m", "eval.bench.vllm", *sys.argv[1:]]
    return shlex.join(words).replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), ".")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a checkpoint, or shapes-small")
    parser.add_argument("--questions", type=int, default=128, help="per round")
    parser.add_argument("--together", type=int, default=32, help="questions in flight")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the first timed one")
    parser.add_argument("--max-model-len", type=int, help="512 for demo, otherwise 2048")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="per engine")
    parser.add_argument("--compile", action="store_true", help="without --enforce-eager")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if (
        min(options.questions, options.together, options.new_tokens, options.rounds) < 1
        or options.warm_up < 0
        or options.kv_cache_gib <= 0
    ):
        parser.error(
            "--questions, --together, --new-tokens and --rounds must be at least 1, --warm-up at "
            "least 0, and --kv-cache-gib above 0"
        )
    if options.max_model_len is None:  # room for two pictures
        options.max_model_len = 512 if options.model == "demo" else 2048
    try:
        with TemporaryDirectory() as folder:
            if options.model in SHAPES:
                source = saved_shapes(options.model, Path(folder))
                preset = preset_of("demo").with_overrides(layer=SHAPES[options.model].layer)
            else:
                source, preset = checkpoint_of(options.model), preset_of(options.model)
            result = run(source, preset, options)
    except CollabError as error:
        raise SystemExit(str(error)) from error
    result = {
        "benchmark": "rows in vLLM",
        "model": options.model,
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cores": os.cpu_count(),
        "questions": options.questions,
        "together": options.together,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "max_model_len": options.max_model_len,
        "eager": not options.compile,
        **result,
    }
    from vllm import __version__

    result["made_by"] = {**provenance("bench_vllm"), "command": command(), "vllm": __version__}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


# vLLM's engine processes import this file again.
if __name__ == "__main__":
    main()
