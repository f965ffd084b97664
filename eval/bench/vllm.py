"""What do attention rows cost in vLLM? First passes with their rows against plain requests.

Two engines of vLLM run side by side in this process's care: one with the plugin, asked through
`VllmBackend`, and one that loads no plugin, asked as any user of vLLM would. Both get the same
prompts and the same new pictures, many at a time, in five ways:

- `rows`: first passes, each of whose rows is fetched, as if every question went on to a region.
- `captured`: first passes whose rows are captured and given back unread: an answer is good enough.
- `plain`: plain requests to the engine without the plugin.
- `statistics`: the same with the log-probabilities that uncertainty needs; so what is left is what
  the row alone costs.
- `control`: plain requests to the engine with the plugin. Two engines are never quite alike; over
  the control, the rows' cost is measured within one engine.

Each round times all of them, in alternating order, so that a busy machine slows all alike. Ratios
are over ours in throughput: the other's time over that of `rows` or `captured`; 1 is no cost. Of
each, the median over the rounds with quartiles, and an interval that holds the median in 95 % of
bootstraps over rounds; of the time elapsed, and of the processor time that front-end, engine and
worker used, which other work on the machine touches less. (Not little: vLLM's engine process spins
while it waits for its worker.) The goal is met if the whole interval of plain over ours in elapsed
time lies above it, missed if it lies below, and undecided otherwise or after a few rounds only.
Tokens of the ways are compared as they are timed (those of `captured` while warming up), and must
be the same in float32.

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
from eval.bench.two_stage import machine, spread
from eval.demo_model.provenance import provenance
from server_plugin.backends.open import checkpoint_of, preset_of
from server_plugin.backends.vllm.model import (
    check,
    engine_options,
    open_vllm_model,
    weightless_adapter,
)
from server_plugin.models.presets import Preset
from server_plugin.vllm_server.launch import PLUGIN, require_vllm
from vlm_collab.errors import CollabError

QUESTION = "what is written on the large red sign?"
GOAL = 0.97
RESAMPLES = 10_000
FEWEST_ROUNDS = 12
"""Bootstraps over fewer give intervals that are too narrow."""
GIB = 2**30
# What a result depends on besides the command's options, on the CPU.
VARIABLES = ("PYTHONPATH", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")

Tokens = tuple[int, ...]
Way = Callable[[Image.Image], Awaitable[Tokens]]


def pictures(count: int, side: int, seed: int) -> list[Image.Image]:
    """Views that no other seed gives, so that no cache knows them."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small]


def ours(backend: Any, new_tokens: int, *, fetched: bool) -> Way:
    """First passes through our backend: statistics of every token, and the row, fetched or not."""

    async def one(picture: Image.Image) -> Tokens:
        view = await backend.open_view(picture)
        first = await backend.first_pass(view, QUESTION, max_new_tokens=new_tokens)
        if fetched:
            await backend.row_of(first)
        await backend.release(view)
        return tuple(first.token_ids)

    return one


def plain(engine: Any, adapter: Any, new_tokens: int, logprobs: int | None) -> Way:
    """Requests as vLLM's own interface takes them."""
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
        # Every request comes as text, here as with us.
        prompt = adapter.prompts.build(QUESTION, 1, new_tokens)
        (place,) = prompt.images
        ids = [*prompt.ids[: place.start + 1], *prompt.ids[place.stop :]]
        request = {"prompt_token_ids": ids, "multi_modal_data": {"image": [picture]}}
        (rendered,) = await engine.renderer.render_cmpl_async([request])
        tokens: list[int] = []
        async for output in engine.generate(rendered, params, f"{logprobs}-{next(numbers)}"):
            tokens += output.outputs[0].token_ids
        adapter.text_of(tokens)  # as ours does
        return tuple(tokens)

    return one


async def ask_all(way: Way, views: Sequence[Image.Image], together: int) -> list[Tokens]:
    """Answers of a way to all pictures, so many at a time that each end is a beginning."""
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
    """Times of all ways, round by round.

    Args:
        workers: the processes of each engine, "ours" and "plain".
    """
    await backend.warm_up()
    ways = {
        "rows": ours(backend, options.new_tokens, fetched=True),
        "captured": ours(backend, options.new_tokens, fetched=False),
        "plain": plain(engine, adapter, options.new_tokens, None),
        "statistics": plain(engine, adapter, options.new_tokens, 2),
        "control": plain(backend.engine, adapter, options.new_tokens, None),
    }
    # Each engine is asked several times: no time must find another's pictures in its caches.
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
    """Medians of the ways' times in seconds, and their ratios, which are of the same rounds."""
    result: dict[str, Any] = {
        "median_s": {name: round(float(np.median(taken)), 4) for name, taken in times.items()}
    }
    pairs = [
        (one, way) for way in ("rows", "captured") for one in ("plain", "statistics", "control")
    ]
    for one, other in (*pairs, ("plain", "control")):
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        result[f"{one}_over_{other}"] = {**spread(ratios), "interval": interval(ratios)}
    return result


def interval(ratios: Sequence[float]) -> list[float]:
    """What holds the median in 95 % of bootstraps over the rounds, its ends included."""
    draw = np.random.default_rng(0)
    resampled = draw.choice(np.asarray(ratios), (RESAMPLES, len(ratios)))
    return [round(float(end), 4) for end in np.percentile(np.median(resampled, 1), (2.5, 97.5))]


def verdict(ratio: dict[str, Any], rounds: int) -> str:
    """Whether a ratio meets the goal, as far as these rounds can tell."""
    low, high = ratio["interval"]
    if rounds < FEWEST_ROUNDS:
        return "undecided"
    return "met" if low >= GOAL else "missed" if high < GOAL else "undecided"


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Processor time that they have used so far, all threads together."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def saved_shapes(name: str, folder: Path) -> str:
    """A random checkpoint of these shapes, as a folder."""
    subject = random_subject(SHAPES[name], torch.device("cpu"), torch.float32, seed=0)
    subject.model.save_pretrained(folder)
    subject.processor.save_pretrained(folder)
    # In the names that the hub's checkpoints have, which the newest transformers shortens and
    # vLLM looks for.
    (weights,) = folder.glob("*.safetensors")
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(weights).items()
    }
    save_file(named, weights, {"format": "pt"})
    return str(folder)


def run(source: str, preset: Preset, options: argparse.Namespace) -> dict[str, Any]:
    """Open both engines on a checkpoint, and measure."""
    require_vllm()
    check(source, preset, options.model)
    engine = {
        "enforce_eager": not options.compile,
        "max_model_len": options.max_model_len,
        # There are two of them.
        "kv_cache_memory_bytes": int(options.kv_cache_gib * GIB),
        "gpu_memory_utilization": 0.45,
    }
    # Which plugins an engine's processes load is settled as they start.
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
        cache = bare.vllm_config.cache_config.kv_cache_memory_bytes / GIB  # variables may set it
        return {
            "kv_cache_gib": round(cache, 3),
            **asyncio.run(measure(backend, bare, adapter, workers, options)),
        }
    finally:
        bare.shutdown()


def command() -> str:
    """What a shell in this folder repeats the run by, with the variables that it depends on."""
    words = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    words += [sys.executable, "-m", "eval.bench.vllm", *sys.argv[1:]]
    return shlex.join(words).replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), ".")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a checkpoint, or shapes-small")
    parser.add_argument("--questions", type=int, default=128, help="of a round")
    parser.add_argument("--together", type=int, default=32, help="questions in flight")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the first timed one")
    parser.add_argument("--max-model-len", type=int, help="512 for demo, otherwise 2048")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="of each engine")
    parser.add_argument("--compile", action="store_true", help="without --enforce-eager")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if (
        min(options.questions, options.together, options.new_tokens, options.rounds) < 1
        or options.warm_up < 0
        or options.kv_cache_gib <= 0
    ):
        parser.error("questions, tokens, rounds and the cache are one or more")
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


# vLLM starts its engines in processes of their own, which import this file again.
if __name__ == "__main__":
    main()
