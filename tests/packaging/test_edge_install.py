"""The plain edge install: the wheel with its dependencies, in a clean environment."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from server_plugin.service.runner import running
from tests.support.patience import PATIENCE_S
from tests.support.process import run
from tests.support.wire import service

LIMIT_BYTES = 60 * 10**6


@dataclass(frozen=True)
class Device:
    """A clean environment with the wheel, its dependencies and nothing else.

    Attributes:
        folder: folder of the environment, which has no pip of its own.
        before: the environment's files, with their sizes in bytes, before anything was installed.
    """

    folder: Path
    before: dict[Path, int]

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python")

    @property
    def program(self) -> str:
        return str(self.folder / "bin/vlm-collab")


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("device") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    empty = Device(folder, sizes_of(folder))
    # pip runs outside the environment, so that its own files do not count.
    run(sys.executable, "-m", "pip", "--python", empty.python, "install", "-q", str(wheel))
    return empty


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service with the scripted backend, in a thread."""
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


def sizes_of(folder: Path) -> dict[Path, int]:
    """Sizes in bytes of all files below a folder, by path within it; links count as such."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {path.relative_to(folder): path.lstat().st_size for path in files}


def test_the_core_and_the_edge_import_without_torch_and_numpy(device: Device, tmp_path: Path):
    code = """
import sys, importlib.util
assert importlib.util.find_spec("numpy") is None and importlib.util.find_spec("torch") is None
import vlm_collab, edge_client
import vlm_collab.protocol.messages, vlm_collab.protocol.edge_session
import vlm_collab.method.policy, vlm_collab.method.cost
import edge_client.client, edge_client.sync, edge_client.cli.main
print(edge_client.__version__)
"""
    done = run(device.python, "-c", code, cwd=tmp_path)
    assert done.stdout.strip()


def test_the_install_is_small(device: Device):
    """All files that pip installs count: packages, their metadata, compiled bytecode, programs."""
    parts: Counter[str] = Counter()
    for path, size in sizes_of(device.folder).items():
        packages = "site-packages" in path.parts
        name = path.parts[path.parts.index("site-packages") + 1] if packages else path.parts[0]
        parts[name] += size - device.before.get(path, 0)
    total, largest = parts.total(), parts.most_common(12)
    print(f"{total / 1e6:.1f} MB in all, the largest in bytes: {largest}")
    assert total <= LIMIT_BYTES, largest


def test_a_question_is_asked_from_the_small_install(device: Device, url: str, tmp_path: Path):
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((1200, 900), 60).convert("RGB").save(photo, quality=95)
    command = (device.program, "ask", str(photo), "a small thing", "--server", url)
    answer = json.loads(run(*command, "--json", cwd=tmp_path).stdout)
    assert answer["refined"] is True
    assert 0 < answer["bytes_up"] < answer["original_bytes"]
    assert "refined answer" in run(*command, cwd=tmp_path).stdout


_ASKING = """
import re, sys, edge_client
from pathlib import Path
with edge_client.Client(sys.argv[1]) as client:
    answer = client.ask(*sys.argv[2:])
status = Path("/proc/self/status").read_text()
peak, after = (re.search(rf"{name}:\\s+(\\d+)", status)[1] for name in ("VmHWM", "VmRSS"))
print(answer.refined, int(peak) * 1024, int(after) * 1024)
"""


def test_asking_about_a_large_photo_takes_little_memory(device: Device, url: str, tmp_path: Path):
    """Decoded, this photo takes 48 MB. Only a region needs them, and they are freed afterwards."""
    photo = tmp_path / "photo.jpg"
    small = Image.effect_noise((400, 300), 60).convert("RGB")
    small.resize((4000, 3000)).save(photo, quality=90)
    python = device.python
    for question, refined in (("what colour is the sky?", "False"), ("a small thing", "True")):
        done = run(python, "-c", _ASKING, url, str(photo), question, cwd=tmp_path)
        found, peak_bytes, after_bytes = done.stdout.split()
        assert found == refined
        assert int(peak_bytes if refined == "False" else after_bytes) < LIMIT_BYTES, done.stdout


def test_policy_and_audit_log_work_from_the_small_install(device: Device, url: str, tmp_path: Path):
    photo, log = tmp_path / "photo.png", tmp_path / "audit.jsonl"
    Image.effect_noise((600, 450), 60).convert("RGB").save(photo)
    policy = tmp_path / "policy.yaml"
    policy.write_text("cameras: {default: {max_regions_per_question: 0}}")
    program = device.program
    command = (program, "ask", str(photo), "a small thing", "--server", url, "--json")
    rules = ("--policy", str(policy), "--audit", str(log))
    answer = json.loads(run(*command, *rules, cwd=tmp_path).stdout)
    assert answer["fallback"] == "declined"
    assert "view" in run(program, "audit", str(log), cwd=tmp_path).stdout
    policy.write_text("cameras: {default: {max_region: 0}}")
    refused = json.loads(run(*command, *rules, code=2, cwd=tmp_path).stdout)
    assert '"max_region" is not known' in refused["error"]


@pytest.mark.parametrize(("command", "extra"), [("serve", "server"), ("demo", "demo")])
def test_commands_of_the_server_say_what_to_install(
    device: Device, command: str, extra: str, tmp_path: Path
):
    done = run(device.program, command, code=2, cwd=tmp_path)
    assert f'pip install "vlm-collab[{extra}]"' in done.stderr
    assert done.stderr.count("\n") == 1
