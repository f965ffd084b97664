"""The demo checkpoint in vLLM: ``pytest -m slow tests/eval/test_demo_model_in_vllm.py``.

Builds an environment of 3.5 GB (`.venv-vllm`) with vLLM for the CPU, so it is not run by default.
"""

from __future__ import annotations

import asyncio
import json
import subprocess

import pytest
from PIL import Image

from eval.signs.drawing import crop, render
from eval.signs.sampling import generate_scene, questions
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import demo_folder, open_model
from tests.support.vllm_cpu.environment import SUPPORT, ensure, environment


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_gives_the_same_answers_as_the_transformers_backend(tmp_path):
    asked, expected = [], []
    backend, _ = open_model(device="cpu", dtype="float32")

    async def ask_ours() -> None:
        for index in range(8):
            scene = generate_scene("test", index)
            picture = render(scene)
            question = questions(scene)[0]
            files = [tmp_path / f"{index}-view.png", tmp_path / f"{index}-local.png"]
            view = picture.resize((112, 112), Image.Resampling.BICUBIC)
            local = crop(picture, question.sign_box, 112)
            view.save(files[0])
            local.save(files[1])
            held = await backend.open_view(view)
            first = await backend.first_pass(
                held, GenerationRequest(question.text, max_new_tokens=8)
            )
            second = await backend.second_pass(
                held, local, GenerationRequest(question.text, max_new_tokens=8)
            )
            for count, answer in ((1, first), (2, second)):
                prompt = f"USER: {'<image>' * count}\n{question.text} ASSISTANT:"
                asked.append({"prompt": prompt, "pictures": [str(f) for f in files[:count]]})
                expected.append(list(answer.token_ids))
        await backend.close()

    asyncio.run(ask_ours())
    done = subprocess.run(
        [ensure(), SUPPORT / "answer.py", demo_folder()],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads([line for line in done.stdout.splitlines() if line.startswith("[[")][-1])
    assert answers == expected
