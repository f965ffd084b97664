"""Checkpoints of Qwen2.5-VL: names, files of different ages, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.adapters.checkpoint import load_processor
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.models.presets import preset_for_model, preset_named
from tests.support.oracle import picture
from tests.support.tiny_qwen import TinyQwen, change_json, save_tiny_qwen
from vlm_collab.errors import ModelError
from vlm_collab.geometry import Fit, Grid, Size

PRESET = preset_named("qwen2.5-vl").with_overrides(layer=1, max_new_tokens=12, view_px=224)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(
        tmp_path_factory.mktemp("tiny") / "mha-224", TinyQwen(more_end_tokens=(74, 209, 154))
    )


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "/x/Qwen2.5-VL-7B"]
)
def test_the_preset_of_hub_names(name: str) -> None:
    preset = preset_for_model(name)
    assert preset == preset_named("qwen2.5-vl")
    assert (preset.layer, preset.view_px, preset.fit) == (22, 224, Fit.STRETCH)


async def test_a_folder_opens_with_the_preset_of_its_family(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backend, preset = open_model(str(folder), layer=3, eta=0.25, device="cpu")
    assert preset == preset_named("qwen2.5-vl").with_overrides(layer=3, eta=0.25)
    assert (backend.info.view, backend.info.grid) == (Size(224, 224), Grid(8, 8))
    view = await backend.open_view(picture(0, backend.info.view))
    answer = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=2))
    assert len(answer.token_ids) == 2
    await backend.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("class_name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_the_hubs_image_processors_load(class_name: str, copy: Path) -> None:
    change_json("preprocessor_config.json", image_processor_type=class_name)(copy)
    processor = load_processor(str(copy)).image_processor
    assert (processor.patch_size, processor.merge_size) == (14, 2)


def test_a_missing_package_is_reported_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only packages for video may be missing."""

    def fail(*_: object, **__: object) -> None:
        raise ImportError("\nQwen2Tokenizer requires the tokenizers library.\n")

    monkeypatch.setattr(Qwen2_5_VLProcessor, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"cannot load its tokenizer .*: Qwen2Tokenizer requires"):
        load_processor(str(folder))


async def test_a_checkpoint_saved_again_by_newer_transformers_loads_alike(
    folder: Path, tmp_path: Path
) -> None:
    """The new format nests the configuration and has one file for all processors."""
    source, again = folder, tmp_path / "again"
    shutil.copytree(source, again)
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(again)
    assert "text_config" in json.loads((again / "config.json").read_text())
    assert "text_config" not in json.loads((source / "config.json").read_text())
    (again / "preprocessor_config.json").unlink()
    load_processor(str(source)).image_processor.save_pretrained(again)
    rows = []
    for each in (source, again):
        backend = TransformersBackend.load(str(each), PRESET, device="cpu")
        view = await backend.open_view(picture(0, backend.info.view))
        rows.append(
            (await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))).row
        )
        await backend.close()
    np.testing.assert_array_equal(rows[0], rows[1])


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual.merger.mlp.0.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def swap_tokenizer(folder: Path) -> None:
    """Make the tokenizer that of a model without pictures."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|image_pad|>", "<|other|>"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "cannot load its weights"),
        (remove("model.safetensors"), "cannot load its weights"),
        (drop_weight, "1 weights do not fit .*missing keys.*merger"),
        (
            change_json("config.json", intermediate_size=99),
            "12 weights do not fit .*mismatched keys",
        ),
        (change_json("config.json", use_sliding_window=True), "sliding or hybrid attention"),
        (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        (remove("tokenizer.json"), "tokenizer"),
        (swap_tokenizer, r"no special token '<\|image_pad\|>' with id"),
        (
            change_json("config.json", vision_start_token_id=5),
            r"no special token '<\|vision_start\|>'",
        ),
        (remove("preprocessor_config.json"), "cannot load its tokenizer or image processor"),
        (
            change_json("preprocessor_config.json", patch_size=16),
            "patch_size 16, its vision tower 14",
        ),
        (change_json("preprocessor_config.json", merge_size=1), "merge_size 1, its vision tower 2"),
        (
            change_json("preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
            "is a CLIPImageProcessor.*, which gives no grid of patches; .* do not belong together",
        ),
        (remove("config.json"), "not a model checkpoint"),
        (change_json("config.json", vision_config=3), "cannot load its config.json"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(
    damage: Callable[[Path], None], complaint: str, copy: Path
) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=complaint) as caught:
        TransformersBackend.load(str(copy), PRESET, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
