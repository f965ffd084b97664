"""The evaluation through the real service: ``python -m eval.demo_model.over_service --out R.json``.

The edge client asks the questions of `eval.demo_model.evaluate` at the service, over a WebSocket on
this machine, with JPEG views and regions. The second pass is forced, so every question has a first
and a refined answer. Reports both accuracies, the bytes sent, and the differences to a results
file made in one process without JPEG.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from eval.demo_model.boxes import contains
from eval.demo_model.figure import RESULTS
from eval.demo_model.provenance import provenance, weights_digest
from eval.demo_model.questions import (
    EvaluationSettings,
    RenderedQuestion,
    render_question,
    settings_of,
)
from eval.demo_model.workers import chunks
from server_plugin.backends.open import open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Options, Retransmit

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class ServiceResult:
    """Result of one question; sizes in bytes, `up` and `down` with WebSocket headers."""

    first: bool
    refined: bool
    holds: bool
    fallback: str
    up: int
    down: int
    view: int
    region: int


def service_result(rendered: RenderedQuestion, answer: EdgeAnswer) -> ServiceResult:
    """Summarise one answer."""
    question = rendered.sample.question
    return ServiceResult(
        first=answer.first_text == question.answer,
        refined=answer.text == question.answer,
        holds=answer.box is not None and contains(answer.box, question.text_box),
        fallback=answer.fallback.name,
        up=answer.bytes_up,
        down=answer.bytes_down,
        view=answer.view_bytes,
        region=answer.region_bytes,
    )


def rendered_questions(settings: EvaluationSettings, indices: list[int]) -> list[RenderedQuestion]:
    """Draw the questions' full-size pictures."""
    return [render_question(settings, index) for index in indices]


async def ask_service(
    settings: EvaluationSettings, placement: str, quality: int
) -> list[ServiceResult]:
    """Ask every question at the service; another process draws the next pictures meanwhile."""
    side = settings.base_px if placement == "sliding" else settings.centroid_px
    backend, preset = open_model(
        "demo", device="cpu", dtype="float32", placement=placement, base_px=side
    )
    if (preset.layer, preset.epsilon) != (settings.layer, settings.epsilon):
        raise ValueError("the reference was made with another layer or epsilon than the preset's")
    service = Service(
        engine_of(backend, preset, None, {}), ServiceConfig(port=0, region_quality=quality)
    )
    options = Options(retransmit=Retransmit.ALWAYS)
    turns = asyncio.Semaphore(_AT_ONCE)
    results: list[ServiceResult] = []
    context = multiprocessing.get_context("spawn")
    loop = asyncio.get_running_loop()
    try:
        async with (
            running(service) as url,
            EdgeClient(url, view_codec=Codec.JPEG, view_quality=quality) as client,
        ):

            async def one(rendered: RenderedQuestion) -> ServiceResult:
                async with turns:
                    picture = Picture.from_pil(rendered.picture)
                    answer = await client.ask(
                        picture, rendered.sample.question.text, options=options
                    )
                return service_result(rendered, answer)

            parts = chunks(settings.indices())
            with (
                ProcessPoolExecutor(1, context) as pool,
                tqdm(total=settings.count, desc=placement, disable=None) as bar,
            ):
                draw = partial(rendered_questions, settings)
                coming = loop.run_in_executor(pool, draw, parts[0])
                for number in range(len(parts)):
                    ready = await coming
                    if number + 1 < len(parts):
                        coming = loop.run_in_executor(pool, draw, parts[number + 1])
                    results += await asyncio.gather(*(one(rendered) for rendered in ready))
                    bar.update(len(ready))
    finally:
        await backend.close()
    return results


def compared(
    results: list[ServiceResult], reference: dict[str, Any], refined: str
) -> dict[str, Any]:
    """Figures of a run, and their differences to the reference on the same questions, in points.

    Args:
        results: results from the service, in the reference's order; possibly fewer.
        reference: one split of a results file.
        refined: name of the reference's answer with the same placement.
    """
    count = len(results)
    figures: dict[str, Any] = {"questions": count, "accuracy": {}, "in_process": {}}
    figures["difference_points"], figures["answers_that_turned"] = {}, {}
    for which, values in (
        ("first", [t.first for t in results]),
        (refined, [t.refined for t in results]),
    ):
        before = [mark == "1" for mark in reference["right_by_question"][which][:count]]
        share, share_before = float(np.mean(values)), float(np.mean(before))
        figures["accuracy"][which] = round(share, 4)
        figures["in_process"][which] = round(share_before, 4)
        figures["difference_points"][which] = round(100 * (share - share_before), 2)
        figures["answers_that_turned"][which] = {
            "to_right": sum(v and not b for v, b in zip(values, before, strict=True)),
            "to_wrong": sum(b and not v for v, b in zip(values, before, strict=True)),
        }
    wrong = [t for t in results if not t.first]
    figures["box_holds_text"] = {
        "all": round(float(np.mean([t.holds for t in results])), 4),
        "first_wrong": round(float(np.mean([t.holds for t in wrong])), 4) if wrong else None,
    }
    figures["mean_bytes"] = {
        name: round(float(np.mean([getattr(t, name) for t in results])), 1)
        for name in ("up", "down", "view", "region")
    }
    figures["fallbacks"] = dict(Counter(t.fallback for t in results))
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, default=RESULTS, help="in-process results")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--placement", choices=("sliding", "centroid"), default="sliding")
    parser.add_argument("--jpeg", type=int, default=90, help="quality of views and regions")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reference = json.loads(options.reference.read_text())[options.split]
    if reference["weights"] != weights_digest():
        raise SystemExit(
            f"{options.reference} is from another checkpoint; run eval.demo_model.evaluate again"
        )
    settings = settings_of(reference["settings"])
    settings = replace(settings, count=min(options.count, settings.count))
    results = asyncio.run(ask_service(settings, options.placement, options.jpeg))
    refined = "own" if options.placement == "sliding" else "centroid"
    figures = compared(results, reference, refined)
    result = {
        "made_by": provenance("over_service"),
        "weights": weights_digest(),
        "reference": {
            "file": options.reference.name,
            "weights": reference["weights"],
            "made_by": reference["made_by"],
        },
        "settings": {**asdict(settings), "jpeg": options.jpeg, "placement": options.placement},
        **figures,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        existing = json.loads(options.out.read_text()) if options.out.exists() else {}
        existing[f"{options.split}/{options.placement}"] = json.loads(text)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(existing, indent=1) + "\n")


if __name__ == "__main__":
    main()
