"""Ask one backend questions: ``drive.py < job.json``; the last line printed is the answers' JSON.

A job is ``{"backend": "vllm" | "transformers", "checkpoint": folder, "preset": preset's name,
"overrides": {…}, "engine": {…}, "together": [1, 8], "pairs": [{"view": file, "region": file,
"question": text}, …]}``. The whole list is asked once for each entry of `together`, that many at
a time. The result is `{"answers": one list for each entry, in the order of the pairs,
"preemptions": how often vLLM preempted a request and recomputed it}`, and from
vLLM "left": the first pass of the first pair, asked again after it was cancelled on its way to the
engine.
"interleaved" of a job is a list of `{"views": files, "region": file, "question": text, "history":
[[text, text], …], "places": [[turn, position, picture], …], "picture": number}`, asked one by one
at the end; "interleaved" of the result are the answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from server_plugin.backends.base import GenerationRequest


async def row_of(backend: Any, generation: Any) -> list[float]:
    # vLLM's rows stay in its workers until they are fetched.
    fetch = getattr(backend, "row_of", None)
    row = generation.row if fetch is None else await fetch(generation)
    return row.tolist()  # type: ignore[no-any-return]


async def answer_of(backend: Any, generation: Any, row: bool = True) -> dict[str, Any]:
    return {
        "ids": list(generation.token_ids),
        "text": generation.text,
        "steps": [list(step) for step in generation.steps],
        "ended": generation.ended,
        "prefilled": generation.prefilled_tokens,
        "context": generation.context_tokens,
        "row": await row_of(backend, generation) if row else None,
    }


async def ask(backend: Any, pair: dict[str, str], new_tokens: int) -> dict[str, Any]:
    from PIL import Image

    view = await backend.open_view(Image.open(pair["view"]).convert("RGB"))
    request = GenerationRequest(pair["question"], max_new_tokens=new_tokens)
    texts: list[str] = []
    first = await backend.first_pass(view, request, on_text=texts.append)
    relative = await backend.relative_attention(view, first)
    again = await backend.relative_attention(view, first)
    region = Image.open(pair["region"]).convert("RGB")
    second = await backend.second_pass(view, region, request)
    cut = await backend.first_pass(
        view,
        request,
        stop=lambda steps, ended: len(steps) == 2,
    )
    await backend.release(view)
    return {
        "first": await answer_of(backend, first),
        "texts": texts,
        "map": relative.map.tolist(),
        "generic": [relative.prefilled_tokens, relative.context_tokens],
        "generic_again": [again.prefilled_tokens, again.context_tokens],
        "second": await answer_of(backend, second, row=False),
        "cut": await answer_of(backend, cut),
    }


async def ask_interleaved(backend: Any, fields: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Both passes of a question with pictures among its texts."""
    from PIL import Image

    from vlm_collab.protocol.image_positions import Place

    files = (*fields["views"], fields["region"])
    *views, region = (Image.open(file).convert("RGB") for file in files)
    view = await backend.open_view(*views)
    request = GenerationRequest(
        fields["question"],
        history=tuple((question, answer) for question, answer in fields["history"]),
        places=tuple(Place(*place) for place in fields["places"]),
        max_new_tokens=new_tokens,
    )
    backend.check_question(request, len(views) + 1)
    first = await backend.first_pass(view, request)
    relative = await backend.relative_attention(view, first)
    second = await backend.second_pass(view, region, request, picture=fields["picture"])
    await backend.release(view)
    return {
        "first": await answer_of(backend, first),
        "maps": [one.tolist() for one in relative.maps],
        "second": await answer_of(backend, second, row=False),
    }


async def ask_after_leaving(backend: Any, pair: dict[str, str], new_tokens: int) -> dict[str, Any]:
    """Cancel a question before its picture reaches vLLM's engine, and ask it again."""
    from PIL import Image

    view = await backend.open_view(Image.open(pair["view"]).convert("RGB"))
    request = GenerationRequest(pair["question"], max_new_tokens=new_tokens)
    renderer = backend._engine.renderer
    render = renderer.render_cmpl_async

    async def leave(requests: list[dict[str, Any]]) -> None:
        await render(requests)
        raise asyncio.CancelledError

    renderer.render_cmpl_async = leave
    try:
        await backend.first_pass(view, request)
    except asyncio.CancelledError:
        pass
    finally:
        renderer.render_cmpl_async = render
    asked_again = await backend.first_pass(view, request)
    return await answer_of(backend, asked_again)


def preemptions() -> int:
    from prometheus_client import REGISTRY

    return sum(
        int(sample.value)
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:num_preemptions_total"
    )


async def run(backend: Any, job: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    await backend.warm_up()
    result: dict[str, Any] = {}
    if job["backend"] == "vllm":
        result["left"] = await ask_after_leaving(backend, job["pairs"][0], new_tokens)
    answers = []
    for together in job["together"]:
        gate = asyncio.Semaphore(together)

        async def one(pair: dict[str, str], gate: asyncio.Semaphore = gate) -> dict[str, Any]:
            async with gate:
                return await ask(backend, pair, new_tokens)

        answers.append(await asyncio.gather(*map(one, job["pairs"])))
    result |= {"answers": answers, "preemptions": preemptions()}
    result["interleaved"] = [
        await ask_interleaved(backend, fields, new_tokens) for fields in job.get("interleaved", ())
    ]
    await backend.close()
    return result


def main() -> None:
    from server_plugin.models.presets import preset_named

    job = json.load(sys.stdin)
    preset = preset_named(job["preset"]).with_overrides(**job["overrides"])
    if job["backend"] == "vllm":
        from server_plugin.backends.vllm.model import open_vllm_model

        backend: Any = open_vllm_model(
            job["checkpoint"], preset, dtype="float32", engine=job["engine"]
        )
    else:
        from server_plugin.backends.transformers.backend import TransformersBackend

        backend = TransformersBackend.load(job["checkpoint"], preset, device="cpu", dtype="float32")
    print(json.dumps(asyncio.run(run(backend, job, preset.max_new_tokens))))


# vLLM starts its engine in another process, which imports this file again.
if __name__ == "__main__":
    main()
