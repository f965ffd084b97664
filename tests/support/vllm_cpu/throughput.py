"""What capture costs: ``throughput.py CHECKPOINT [BLOCKS] [QUESTIONS]``, in the vLLM environment.

In one engine, the same first passes are run in turn through the backend with their rows captured
and fetched, and as plain requests of vLLM without log-probabilities; many at a time, the prefix
cache emptied before each block. Printed is each way's time per block, and the median over pairs of
neighbouring blocks of plain time over captured time (1 is no cost; the goal is 0.97 or more).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import Any


def pictures(count: int, side: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small]


async def captured(backend: Any, views: list[Any], question: str, new_tokens: int) -> None:
    await asyncio.gather(
        *(backend.first_pass(view, question, max_new_tokens=new_tokens) for view in views)
    )


async def plain(engine: Any, backend: Any, views: list[Any], question: str, most: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from server_plugin.vllm.backend import _collapsed

    params = SamplingParams(
        temperature=0.0,
        max_tokens=most,
        ignore_eos=True,
        stop_token_ids=sorted(backend._adapter.end_tokens),
        output_kind=RequestOutputKind.DELTA,
    )
    ids = _collapsed(backend._adapter.prompts.build(question, 1, most))

    async def one(number: int, view: Any) -> None:
        request = {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": [view.picture.image]},
            "multi_modal_uuids": {"image": [view.picture.name]},
        }
        (rendered,) = await engine.renderer.render_cmpl_async([request])
        async for _ in engine.generate(rendered, params, f"{time.monotonic()}-{number}"):
            pass

    await asyncio.gather(*(one(number, view) for number, view in enumerate(views)))


async def run(backend: Any, blocks: int, count: int) -> None:
    await backend.warm_up()
    engine, question = backend._engine, "what is written on the large red sign?"
    views = [await backend.open_view(image) for image in pictures(count, backend.info.view.width)]
    ways = {
        "captured": lambda: captured(backend, views, question, 8),
        "plain": lambda: plain(engine, backend, views, question, 8),
    }
    for way in ways.values():
        await way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks):
        # In turns first: whatever else the machine does hits both alike.
        for name in list(ways)[:: 1 if block % 2 else -1]:
            await engine.reset_prefix_cache()
            began = time.perf_counter()
            await ways[name]()
            times[name].append(time.perf_counter() - began)
    await backend.close()
    ratios = [p / c for c, p in zip(times["captured"], times["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    print(
        json.dumps(
            {
                "questions": count,
                "blocks": blocks,
                "median_s": seconds,
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        )
    )


def main() -> None:
    from server_plugin.presets import preset_named
    from server_plugin.vllm.model import open_vllm_model

    checkpoint, blocks, count = sys.argv[1], *map(int, (*sys.argv[2:], "20", "32")[:2])
    options = {"enforce_eager": True, "max_model_len": 512}
    backend = open_vllm_model(checkpoint, preset_named("demo"), dtype="float32", engine=options)
    asyncio.run(run(backend, blocks, count))


# vLLM starts its engine in a process of its own, which imports this file again.
if __name__ == "__main__":
    main()
