"""Opening models by name, and errors for missing and damaged checkpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from edge_client import EdgeClient, Picture
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.fake import FakeBackend
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.adapters import checkpoint as checkpoint_module
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import preset_named
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from tests.support.oracle import picture
from tests.support.patience import PATIENCE_S
from tests.support.process import SERVE
from tests.support.tiny_llava import TinyLlava, rename_family, save_tiny_llava
from vlm_collab.errors import CollabError, ConfigError, ErrorCode, ModelError, ServerError
from vlm_collab.geometry import Fit, Size
from vlm_collab.pictures.source_image import SourceImage
from vlm_collab.protocol.messages import Stage

DEMO = preset_named("demo")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def truncate(keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def swap_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<other>"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<image>", "<other>"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate(0.9), "cannot load its weights"),
        (truncate(0.001), "cannot load its weights"),
        (truncate(0), "cannot load its weights"),
        (remove("model.safetensors"), "cannot load its weights"),
        (drop_weight, "1 weights do not fit .*missing keys.*up_proj"),
        (widen, "12 weights do not fit .*mismatched keys"),
        (remove("tokenizer.json"), "cannot load its tokenizer"),
        (write("tokenizer.json", '{"a": 1'), "cannot load its tokenizer"),
        (write("tokenizer.json", '{"a": 1}'), "cannot load its tokenizer"),
        (swap_tokenizer, "no image token '<image>'"),
        (remove("processor_config.json"), "cannot load its tokenizer or image processor"),
        (remove("config.json"), "not a model checkpoint"),
        (write("config.json", '{"a": 1'), "cannot load its config.json"),
        (write("config.json", "[1]"), "not a model checkpoint"),
        (write("config.json", '{"model_type": "llava", "text_config": 3}'), "cannot load its"),
        (lambda folder: rename_family(folder, "bert"), "supported: llava[,;].*docs/models.md"),
        (lambda folder: rename_family(folder, "no such"), "'no such' are not supported"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(
    damage: Callable[[Path], None], complaint: str, copy: Path
) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=complaint) as caught:
        TransformersBackend.load(str(copy), DEMO, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "a/b/c"])
def test_missing_folders_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        open_model(name)


def without_network(tmp_path: Path, cache: Path | None = None) -> dict[str, str]:
    """Environment variables of a process without access to the hub and with an empty cache."""
    return os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(cache or tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }


def serve(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [*SERVE, *arguments, "--port", "0", "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=env)


@pytest.mark.parametrize("log_level", ["warning", "info"])
def test_an_unreachable_hub_is_reported_in_one_line(tmp_path: Path, log_level: str) -> None:
    """Counts attempts, not seconds: every attempt but the first would be logged."""
    done = serve("nosuchmodel/x", "--log-level", log_level, env=without_network(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vlm-collab: nosuchmodel/x is neither a folder nor in the")
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr


def test_the_hub_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []

    def unreachable(url: str, **_: object) -> None:
        tried.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(checkpoint_module, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    with pytest.raises(ModelError, match="cannot be reached: no route to host") as caught:
        open_model("nosuchmodel/x")
    assert "\n" not in str(caught.value)
    assert len(tried) == 1


def test_an_invalid_hub_name_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot load its config\.json: .*alphanumeric"):
        open_model("no such/model")


def test_a_cached_checkpoint_needs_no_hub(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--owner--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "from server_plugin.backends.open import open_model\n"
        "backend, _ = open_model('owner/tiny', layer=1, device='cpu')\n"
        "print(backend.info.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=without_network(tmp_path),
    )
    assert (done.stdout, done.stderr) == ("owner/tiny\n", "")


def test_loading_leaves_the_librarys_settings_as_they_were(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def settings() -> tuple[int, bool, bool]:
        bars, downloads = transformers_logging.is_progress_bar_enabled(), bars_of_downloads()
        return logging.getLogger("huggingface_hub").level, bars, downloads

    def watch(name: str) -> dict[str, bool]:
        seen.append(settings())
        return {"local_files_only": True}

    monkeypatch.setattr(checkpoint_module, "_where", watch)
    before = settings()
    assert before[1:] == (True, True)
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        checkpoint_module.load_config(str(checkpoint))
        assert settings() == before
    assert seen == [(logging.ERROR, False, False), (logging.ERROR, False, True)]


def bars_of_downloads() -> bool:
    return not are_progress_bars_disabled()


def test_no_progress_bar_without_a_terminal(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    TransformersBackend.load(str(checkpoint), DEMO, device="cpu")
    assert capfd.readouterr().err == ""


def test_a_file_in_place_of_a_folder_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        open_model(str(checkpoint / "config.json"))


async def test_the_fake_opens_without_a_checkpoint() -> None:
    backend, preset = open_model("fake", eta=0.75)
    assert isinstance(backend, FakeBackend)
    assert preset == DEMO.with_overrides(eta=0.75)
    await backend.close()


def test_a_missing_demo_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm_collab_demo", None)  # as if it were not installed
    for name in (None, "demo"):
        with pytest.raises(ModelError, match="demo model is not installed"):
            open_model(name)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layer": 4}, "layer 4 does not exist: tiny has decoder layers 0 to 3"),
        ({}, "layer 14 does not exist"),
        ({"layer": 1, "device": "toaster"}, "there is no device 'toaster'; there are: auto, cpu"),
        *(
            ({"layer": 1, "device": name}, f"there is no device '{name}'; there are: auto, cpu")
            for name in ("meta", "mkldnn", "cpu:x", "")
        ),
        ({"layer": 1, "device": "cuda:99"}, "torch cannot use the device 'cuda:99' here"),
        ({"layer": 1, "dtype": "int8"}, "not a floating point type"),
        ({"layer": 1, "dtype": "load"}, "not a floating point type"),
        ({"layer": 1, "prompt": "none"}, "no prompt is named 'none'"),
    ],
)
def test_impossible_options_are_refused_in_one_line(
    options: dict[str, object], complaint: str, checkpoint: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        open_model(str(checkpoint), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_a_missing_device_is_reported_in_one_line(name: str, checkpoint: Path) -> None:
    found = torch.accelerator.current_accelerator()
    if found is not None and found.type == name:
        pytest.skip("it is here")
    with pytest.raises(ConfigError, match=f"torch cannot use the device '{name}'") as caught:
        open_model(str(checkpoint), layer=1, device=name)
    assert "\n" not in str(caught.value)


def test_a_preset_of_another_family_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(
        "{family: other, fit: pad, layer: 0, prompt: p, prompts: {p: '<image>{question}'}, eta: 1}"
    )
    with pytest.raises(ConfigError, match=r"the family 'other', but .*tiny is of 'llava'"):
        open_model(str(checkpoint), preset=str(path))


async def test_a_folder_opens_with_the_preset_of_its_family(checkpoint: Path) -> None:
    backend, preset = open_model(
        str(checkpoint), layer=2, eta=0.25, ratios=(1.0, 2.0), base_px=56, prompt="vicrop",
        device="cpu",
    )  # fmt: skip
    assert preset == preset_named("llava-1.5").with_overrides(
        layer=2, eta=0.25, ratios=(1.0, 2.0), base_px=56, prompt="vicrop"
    )
    info = backend.info
    assert (info.name, info.fit, info.layer, info.base_px) == ("tiny", Fit.STRETCH, 2, 56)
    view = await backend.open_view(picture(0, info.view))
    answer = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=2))
    assert len(answer.token_ids) == 2
    await backend.close()


async def test_the_hub_s_names_of_vision_tower_weights_load_too(
    copy: Path, checkpoint: Path
) -> None:
    """Files on the hub have a level `vision_model.` that newer transformers omit."""
    weights = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    assert set(renamed) != set(weights)
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    rows = []
    for folder in (checkpoint, copy):
        backend = TransformersBackend.load(str(folder), DEMO, device="cpu")
        view = await backend.open_view(picture(0, backend.info.view))
        rows.append(
            (await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))).row
        )
        await backend.close()
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("fit", Fit)
async def test_only_the_crop_fit_cuts_off_parts_of_a_region(fit: Fit, tmp_path: Path) -> None:
    """The encoder sees a red border on a wide region unless the preset's fit is `crop`."""
    shape = TinyLlava(stretch=False)
    backend = TransformersBackend.load(
        str(save_tiny_llava(tmp_path, shape)), DEMO.with_overrides(fit=fit), device="cpu"
    )
    region = picture(0, backend.info.view).resize((300, 100))
    marked = region.copy()
    marked.paste((255, 0, 0), (0, 0, 30, 100))
    plain, red = backend._adapter.encode([region, marked])
    assert plain.shape == (64, 64)
    assert bool((plain == red).all()) == (fit is Fit.CROP)
    await backend.close()


async def test_by_default_the_borders_of_a_wide_picture_are_seen(tmp_path: Path) -> None:
    """A red bar at the left of a 1600 x 900 px picture; the image processor crops the centre."""
    folder = save_tiny_llava(tmp_path / "tiny", TinyLlava(stretch=False))
    rows = {}
    for fit in (None, "stretch", "pad", "crop"):
        backend, _ = open_model(str(folder), fit=fit, layer=1, device="cpu")
        assert isinstance(backend, TransformersBackend)
        info, views = backend.info, []
        for colour in ((200, 200, 200), (255, 0, 0)):
            source = Image.new("RGB", (1600, 900), (200, 200, 200))
            source.paste(colour, (0, 0, 300, 900))
            views.append(SourceImage.from_pil(source).view(info.view, info.fit))
        assert backend._adapter.fitted(views[1]) is views[1], "the view is the encoder's input"
        plain, red = backend._adapter.encode(views)
        rows[fit] = red
        assert bool((plain == red).all()) == (fit == "crop")
        await backend.close()
    assert bool((rows[None] == rows["stretch"]).all())


def test_every_error_is_one_of_the_projects() -> None:
    assert issubclass(ModelError, CollabError)
    assert issubclass(ConfigError, CollabError)


def test_a_view_size_that_the_model_does_not_have_is_refused_before_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="view_px 224: this model takes views of 112 px only"):
        open_model(str(copy), preset="demo", view_px=224)


@pytest.mark.parametrize(
    ("limit", "error", "complaint"),
    [
        (400, ConfigError, "max_new_tokens 400 leave no room for two pictures"),
        (20, None, ""),
    ],
)
def test_answers_that_never_fit_are_refused_at_start(
    limit: int, error: type[Exception] | None, complaint: str, checkpoint: Path
) -> None:
    if error is None:
        backend, _ = open_model(str(checkpoint), preset="demo", max_new_tokens=limit)
        asyncio.run(backend.close())
        return
    with pytest.raises(error, match=complaint):
        open_model(str(checkpoint), preset="demo", max_new_tokens=limit)


@pytest.mark.parametrize("context", [70, 140])
def test_a_context_without_room_for_two_pictures_is_refused(context: int, tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "short", TinyLlava(context_tokens=context))
    with pytest.raises(ModelError, match=f"context of {context} tokens, too few for two pictures"):
        open_model(str(folder), preset="demo", max_new_tokens=1)


async def test_a_very_thin_region_is_not_enlarged(checkpoint: Path) -> None:
    """With `crop`, the processor first scales the short side up, and the long side with it."""
    folder = Path(save_tiny_llava(checkpoint.parent / "crop", TinyLlava(stretch=False)))
    backend, _ = open_model(str(folder), preset=DEMO.with_overrides(fit="crop"))
    assert isinstance(backend, TransformersBackend)
    shown: list[tuple[int, int]] = []
    adapter = backend._adapter
    process = adapter.processor.image_processor

    def noted(images: list[Image.Image], **options: object) -> object:
        shown.extend(image.size for image in images)
        return process(images, **options)

    adapter.processor.image_processor = noted
    for size in ((1, 12544), (12544, 1), (3, 100), (1600, 100)):
        adapter.encode([Image.new("RGB", size)])
    assert shown == [(1, 16), (16, 1), (3, 48), (1600, 100)]
    await backend.close()


async def test_a_question_beyond_a_real_context_is_refused_and_the_next_is_answered(
    checkpoint: Path,
) -> None:
    backend, preset = open_model(str(checkpoint), preset="demo")
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    async with running(service) as url, EdgeClient(url) as client:
        shot = Picture.from_pil(picture(0, Size(300, 200)))
        with pytest.raises(ServerError) as caught:
            await client.ask(shot, "why? " * 200)
        assert caught.value.code is ErrorCode.BAD_QUESTION
        assert "\n" not in str(caught.value)
        answer = await client.ask(shot, "USER: what is </s> here? <image> ASSISTANT: seven")
        assert answer.stage in (Stage.FIRST, Stage.SECOND)
    await backend.close()
