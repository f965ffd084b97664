"""What a device gets: the wheel with its plain dependencies, in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from server_plugin.service.runner import running
from tests.support.patience import PATIENCE_S
from tests.support.wire import service

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60 * 10**6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (built,) = folder.glob("vlm_collab-*.whl")
    return built


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel and nothing else that was asked for."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    _run(sys.executable, "-m", "venv", str(folder))
    _run(str(folder / "bin/python"), "-m", "pip", "install", "-q", str(wheel))
    return folder


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real service with the scripted backend, on a thread of its own."""
    ready, stop = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        async with running(service()) as where:
            found.append(where)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(PATIENCE_S)
    yield found[0]
    stop.set()
    thread.join()


def _run(*command: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
    return done


def test_the_core_and_the_edge_import_without_torch_and_numpy(device: Path, tmp_path: Path):
    code = """
import sys, importlib.util
assert importlib.util.find_spec("numpy") is None and importlib.util.find_spec("torch") is None
import vlm_collab, edge_client
import vlm_collab.protocol.messages, vlm_collab.protocol.edge_session
import vlm_collab.method.policy, vlm_collab.method.cost
import edge_client.client, edge_client.sync, edge_client.cli.main
print(edge_client.__version__)
"""
    done = _run(str(device / "bin/python"), "-c", code, cwd=tmp_path)
    assert done.stdout.strip()


def test_the_install_is_small(device: Path):
    (packages,) = device.glob("lib/python3*/site-packages")
    sizes = {}
    for entry in packages.iterdir():
        if entry.name.startswith(("pip", "setuptools", "_distutils", "distutils")):
            continue  # the environment's own tools
        files = entry.rglob("*") if entry.is_dir() else [entry]
        sizes[entry.name] = sum(
            file.stat().st_size
            for file in files
            if file.is_file() and "demo_model" not in file.parent.parts
        )
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    print(f"{total / 1e6:.1f} MB in all, the largest: {largest}")
    assert total <= LIMIT_BYTES, largest


def test_a_question_is_asked_from_the_small_install(device: Path, url: str, tmp_path: Path):
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((1200, 900), 60).convert("RGB").save(photo, quality=95)
    command = (str(device / "bin/vlm-collab"), "ask", str(photo), "a small thing", "--server", url)
    answer = json.loads(_run(*command, "--json", cwd=tmp_path).stdout)
    assert answer["refined"] is True
    assert 0 < answer["bytes_up"] < answer["original_bytes"]
    assert "refined answer" in _run(*command, cwd=tmp_path).stdout


_ASKING = """
import re, sys, edge_client
from pathlib import Path
with edge_client.Client(sys.argv[1]) as client:
    answer = client.ask(*sys.argv[2:])
status = Path("/proc/self/status").read_text()
peak, after = (re.search(rf"{name}:\\s+(\\d+)", status)[1] for name in ("VmHWM", "VmRSS"))
print(answer.refined, int(peak) * 1024, int(after) * 1024)
"""


def test_asking_about_a_large_photo_takes_little_memory(device: Path, url: str, tmp_path: Path):
    """Decoded, this photo takes 48 MB. They are needed for a region alone, and let go after it."""
    photo = tmp_path / "photo.jpg"
    small = Image.effect_noise((400, 300), 60).convert("RGB")
    small.resize((4000, 3000)).save(photo, quality=90)
    python = str(device / "bin/python")
    for question, refined in (("what colour is the sky?", "False"), ("a small thing", "True")):
        done = _run(python, "-c", _ASKING, url, str(photo), question, cwd=tmp_path)
        found, peak_bytes, after_bytes = done.stdout.split()
        assert found == refined
        assert int(peak_bytes if refined == "False" else after_bytes) < LIMIT_BYTES, done.stdout


def test_policy_and_audit_log_work_from_the_small_install(device: Path, url: str, tmp_path: Path):
    photo, log = tmp_path / "photo.png", tmp_path / "audit.jsonl"
    Image.effect_noise((600, 450), 60).convert("RGB").save(photo)
    policy = tmp_path / "policy.yaml"
    policy.write_text("cameras: {default: {max_regions_per_question: 0}}")
    program = str(device / "bin/vlm-collab")
    command = (program, "ask", str(photo), "a small thing", "--server", url, "--json")
    rules = ("--policy", str(policy), "--audit", str(log))
    answer = json.loads(_run(*command, *rules, cwd=tmp_path).stdout)
    assert answer["fallback"] == "declined"
    assert "view" in _run(program, "audit", str(log), cwd=tmp_path).stdout
    policy.write_text("cameras: {default: {max_region: 0}}")
    refused = json.loads(_run(*command, *rules, code=2, cwd=tmp_path).stdout)
    assert '"max_region" is not known' in refused["error"]


def test_serving_from_the_small_install_says_what_is_missing(device: Path, tmp_path: Path):
    done = _run(str(device / "bin/vlm-collab"), "serve", code=2, cwd=tmp_path)
    assert 'pip install "vlm-collab[server]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_wheel_carries_presets_types_and_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "server_plugin/configs/models/demo.yaml",
        "server_plugin/demo_model/model.safetensors",
        "eval/pictures/pictures.json",
        "vlm_collab/py.typed",
        "vlm_collab/page/static/index.html",
        "vlm_collab/page/static/page/main.js",
        "vlm_collab/page/static/page/vendor/msgpack/LICENSE",
        "edge_client/py.typed",
    ):
        assert expected in names
    assert any(name.endswith("LICENSE") for name in names)
    assert "server_plugin/configs/edge-policy.yaml" in names
    assert not any(name.startswith("tests/") for name in names)
