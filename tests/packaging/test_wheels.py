"""What the wheels hold, and that every command works from them alone, without the checkout."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.process import run

COMMANDS = (
    *(("ask",), ("audit",), ("chat",), ("gateway",), ("watch",), ("serve",), ("demo",), ("flops",)),
    *(("eval", "run"), ("eval", "report"), ("calibrate", "threshold"), ("calibrate", "layers")),
)


@pytest.fixture(scope="module")
def installed(wheel: Path, demo_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with both wheels.

    Their dependencies take gigabytes, so those of the environment that runs these tests are used.
    That environment comes last in the import path, so the checkout that it may refer to is never
    imported.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = str(folder / "bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", str(wheel), str(demo_wheel))
    (packages,) = folder.glob("lib/python3*/site-packages")
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (packages / "borrowed.pth").write_text(borrowed, encoding="utf-8")
    return folder / "bin"


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_prints_its_help(installed: Path, command: tuple[str, ...], tmp_path: Path):
    done = run(str(installed / "vlm-collab"), *command, "--help", cwd=tmp_path)
    assert "Usage: vlm-collab" in done.stdout


def test_the_demo_runs(installed: Path, tmp_path: Path):
    run(str(installed / "vlm-collab"), "demo", "--out", "out", cwd=tmp_path)
    records = json.loads((tmp_path / "out/demo.json").read_text(encoding="utf-8"))
    assert all(record["answer"] == record["truth"] for record in records)
    assert all(str(installed.parent) in record["photo"] for record in records)


def test_an_evaluation_runs(installed: Path, tmp_path: Path):
    run(
        *(str(installed / "vlm-collab"), "eval", "run", "--task", "signs"),
        *("--limit", "2", "--out", "out"),
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["samples"] == 2


def test_everything_is_imported_from_the_wheels(installed: Path, tmp_path: Path):
    code = """
import importlib.util
import edge_client, eval, eval.lmms_plugin.manifest, server_plugin, vlm_collab, vlm_collab_demo
for package in (edge_client, eval, server_plugin, vlm_collab, vlm_collab_demo):
    print(package.__file__)
assert importlib.util.find_spec("eval.demo_model") is None
assert importlib.util.find_spec("eval.bench") is None
"""
    for file in run(str(installed / "python"), "-c", code, cwd=tmp_path).stdout.splitlines():
        assert file.startswith(str(installed.parent) + os.sep)


def test_the_wheel_carries_presets_types_and_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "server_plugin/configs/models/demo.yaml",
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


def test_weights_and_pictures_have_a_wheel_of_their_own(wheel: Path, demo_wheel: Path):
    heavy = (".safetensors", ".jpg")
    names = zipfile.ZipFile(demo_wheel).namelist()
    assert "vlm_collab_demo/demo_model/model.safetensors" in names
    assert "vlm_collab_demo/pictures/pictures.json" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.endswith(heavy) for name in zipfile.ZipFile(wheel).namelist())


def test_training_and_benchmarks_stay_in_the_checkout(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "eval/cli/demo.py" in names
    assert not any(name.startswith(("eval/demo_model/", "eval/bench/")) for name in names)


def test_what_renews_files_of_the_checkout_stays_there(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "eval/report/demo.py" not in names
    assert "eval/tasks/against_lmms_eval.py" not in names
    assert "eval/signs/build.py" in names  # docs/lmms-eval.md tells users to run it
