"""What do attention rows cost in vLLM? First passes with their rows against plain requests.

Two engines of vLLM run side by side in this process's care: one with the plugin, asked through
`VllmBackend`, and one that loads no plugin, asked as any user of vLLM would. Both get the same
prompts and the same new pictures, many at a time; each round times both, in alternating order, so
that a busy machine slows both alike. The ratio is the plain engine's time over ours, which is
ours over plain in throughput: 1 is no cost. Medians over the rounds, with quartiles, of the time
elapsed and of the processor time that front-end and engine used, which other work on the machine
hardly touches. Two engines are never quite alike, so there are two more ways: plain requests to the
engine with the plugin (the control: over it, the rows' cost is measured within one engine), and
plain requests with the log-probabilities that uncertainty needs, which tell what the row alone
costs. The tokens of all ways are compared in every round, and must be the same in float32.

The last line is one JSON object. Run `python -m eval.bench_vllm` where vLLM is installed
(docs/vllm.md says how the tests install it for the CPU).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
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

from eval.bench_two_stage import SHAPES, machine, random_subject, spread
from eval.demo_model.provenance import provenance
from server_plugin.models import checkpoint_of, preset_of
from server_plugin.presets import Preset
from server_plugin.vllm.model import check, engine_options, open_vllm_model, weightless_adapter
from server_plugin.vllm.serve import PLUGIN, require_vllm
from vlm_collab.errors import CollabError

QUESTION = "what is written on the large red sign?"
GOAL = 0.97

Tokens = tuple[int, ...]
Way = Callable[[Image.Image], Awaitable[Tokens]]


def pictures(count: int, side: int, seed: int) -> list[Image.Image]:
    """Views that no other seed gives, so that no cache knows them."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small]


def with_rows(backend: Any, new_tokens: int) -> Way:
    """First passes through our backend: statistics of every token, and the row."""

    async def one(picture: Image.Image) -> Tokens:
        view = await backend.open_view(picture)
        first = await backend.first_pass(view, QUESTION, max_new_tokens=new_tokens)
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
        "rows": with_rows(backend, options.new_tokens),
        "plain": plain(engine, adapter, options.new_tokens, None),
        "statistics": plain(engine, adapter, options.new_tokens, 2),
        "control": plain(backend.engine, adapter, options.new_tokens, None),
    }
    ours = {"rows", "control"}
    side = backend.info.view.width
    wall: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-options.warm_up, options.rounds):
        order = list(itertools.permutations(ways))[number % 24]
        answers: dict[str, list[Tokens]] = {}
        for name in order:
            # Each engine is asked twice: the second time must not find the first's caches.
            seed = 2 * (number + options.warm_up) + (name in ("statistics", "control"))
            views = pictures(options.questions, side, seed)
            processes = [psutil.Process(), *workers["ours" if name in ours else "plain"]]
            began, before = time.perf_counter(), cpu_s(processes)
            answers[name] = await ask_all(ways[name], views, options.together)
            if number >= 0:
                wall[name].append(time.perf_counter() - began)
                work[name].append(cpu_s(processes) - before)
        if answers["rows"] != answers["plain"] or answers["control"] != answers["statistics"]:
            raise SystemExit("the two engines do not give the same answers")
    await backend.close()

    def compared(times: dict[str, list[float]]) -> dict[str, Any]:
        def over(one: str, other: str = "rows") -> dict[str, float]:
            return spread([a / b for a, b in zip(times[one], times[other], strict=True)])

        return {
            "median_s": {name: round(float(np.median(taken)), 4) for name, taken in times.items()},
            "plain_over_rows": over("plain"),
            "statistics_over_rows": over("statistics"),
            "control_over_rows": over("control"),
            "plain_over_control": over("plain", "control"),
        }

    return {"goal": GOAL, "elapsed": compared(wall), "cpu": compared(work)}


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
    engine = {"enforce_eager": not options.compile, "max_model_len": options.max_model_len}
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
        return asyncio.run(measure(backend, bare, adapter, workers, options))
    finally:
        bare.shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a checkpoint, or shapes-small")
    parser.add_argument("--questions", type=int, default=128, help="of a round")
    parser.add_argument("--together", type=int, default=32, help="questions in flight")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the first timed one")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="without --enforce-eager")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if (
        min(options.questions, options.together, options.new_tokens, options.rounds) < 1
        or options.warm_up < 0
    ):
        parser.error("questions, tokens and rounds are one or more")
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
        "eager": not options.compile,
        **result,
    }
    made = provenance("bench_vllm")
    made["command"] = made["command"].replace("eval.demo_model.", "eval.")
    from vllm import __version__

    result["made_by"] = {**made, "vllm": __version__}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


# vLLM starts its engines in processes of their own, which import this file again.
if __name__ == "__main__":
    main()
