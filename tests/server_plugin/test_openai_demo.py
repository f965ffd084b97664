"""OpenAI's APIs with the demo model: whole pictures get the answers that an edge gets."""

from __future__ import annotations

import asyncio

from eval.demo import PICTURES, cases
from server_plugin.assembly import engine_of
from server_plugin.models import open_model
from server_plugin.service.app import Service
from server_plugin.service.config import ServiceConfig
from tests.support.openai_client import asking, message, said


async def test_whole_pictures_are_read_in_two_stages():
    backend, preset = await asyncio.to_thread(open_model, "demo")
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    refined = []
    try:
        async with asking(service) as client:
            for case in cases(PICTURES):
                data = case.photo.read_bytes()
                chat = await client.chat.completions.create(
                    model="demo", messages=[message(case.question, data)]
                )
                response = await client.responses.create(
                    model="demo", input=[said(case.question, data)]
                )
                assert chat.choices[0].message.content == response.output_text == case.truth
                told = chat.vlm_collab
                assert told["original_bytes"] == len(data)
                assert told["first_text"] == response.vlm_collab["first_text"]
                refined.append(told["refined"] and told["first_text"] != case.truth)
    finally:
        await backend.close()
    assert any(refined)
    assert not all(refined)
