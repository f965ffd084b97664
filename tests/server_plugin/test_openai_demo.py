"""OpenAI's APIs with the demo model: whole pictures get the answers that an edge gets."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from eval.cli.demo import cases
from server_plugin.backends.open import open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from tests.support.openai_client import asking, input_message, message


async def test_whole_pictures_are_read_in_two_stages():
    backend, preset = await asyncio.to_thread(open_model, "demo")
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    refined = []
    try:
        async with asking(service) as client:
            for case in cases():
                data = case.photo.read_bytes()
                chat = await client.chat.completions.create(
                    model="demo", messages=[message(case.question, data)]
                )
                response = await client.responses.create(
                    model="demo", input=[input_message(case.question, data)]
                )
                assert chat.choices[0].message.content == response.output_text == case.truth
                reports = chat.vlm_collab
                assert reports["original_bytes"] == len(data)
                assert reports["first_text"] == response.vlm_collab["first_text"]
                refined.append(reports["refined"] and reports["first_text"] != case.truth)
    finally:
        await backend.close()
    assert any(refined)
    assert not all(refined)


async def test_the_first_question_about_pictures_may_have_text_between_them():
    """It is the first question, so its answer also reports the cost of opening the views."""
    backend, preset = await asyncio.to_thread(open_model, "demo")
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    one, other = cases()[:2]
    shown = [
        f"data:image/jpeg;base64,{base64.b64encode(case.photo.read_bytes()).decode()}"
        for case in (one, other)
    ]
    content: list[Any] = [
        {"type": "text", "text": "Image 1:"},
        {"type": "image_url", "image_url": {"url": shown[0]}},
        {"type": "text", "text": "Image 2:"},
        {"type": "image_url", "image_url": {"url": shown[1]}},
        {"type": "text", "text": other.question},
    ]
    asked: list[Any] = [{"role": "user", "content": content}]
    reports = []
    try:
        async with asking(service) as client:
            for retransmit in ("never", "always"):
                completion = await client.chat.completions.create(
                    model="demo",
                    messages=asked,
                    extra_body={"vlm_collab": {"retransmit": retransmit}},
                )
                reports.append(completion)
    finally:
        await backend.close()
    first, second = reports
    assert first.choices[0].message.content == second.vlm_collab["first_text"]
    assert second.vlm_collab["refined"]
    # The views, with all pictures in front, and then nearly all of the prompt once more.
    visual = 2 * backend.info.visual_tokens
    assert first.usage.prompt_tokens > 2 * visual
