"""Presets: those in `configs/models/`, and invalid ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from server_plugin.backends.open import open_model
from server_plugin.models.presets import (
    Preset,
    config_folder,
    load_preset,
    load_presets,
    preset_for_family,
    preset_for_model,
    preset_named,
)
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Fit
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.method.roi import DEFAULT_RATIOS

MINIMAL = """
family: llava
fit: crop
layer: 14
prompt: chat
prompts: {chat: "USER: <image>\\n{question} ASSISTANT:"}
eta: 0.5
"""


def preset_from(text: str, folder: Path) -> Preset:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_preset(path)


def test_every_shipped_preset_loads_and_has_a_family_default() -> None:
    presets = load_presets()
    assert {"demo", "llava-1.5"} <= set(presets)
    for preset in presets.values():
        assert preset_for_family(preset.family).family_default


def test_shipped_values() -> None:
    demo, llava = preset_named("demo"), preset_named("llava-1.5")
    assert (demo.fit, demo.layer, demo.local_view_px) == (Fit.STRETCH, 1, 112)
    assert demo.template == "USER: <image>\n{question} ASSISTANT:"
    assert (llava.fit, llava.layer) == (Fit.STRETCH, 14)
    assert llava.template == "USER: <image>\n{question} ASSISTANT:"
    assert llava.with_overrides(prompt="vicrop").template == (
        "<image>\nUSER: {question} Answer the question using a single word or phrase.\nASSISTANT:"
    )
    assert (llava.epsilon, llava.base_px) == (0.0, None)
    for preset in (demo, llava):
        assert preset.generic_instruction == "Write a general description of the image."
        assert preset.ratios == DEFAULT_RATIOS == (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
        assert (preset.metric, preset.aggregate) == (Metric.MIN_ENTROPY, Aggregate.FULL)


def test_no_shipped_preset_hides_a_part_of_a_picture() -> None:
    for name, preset in load_presets().items():
        assert preset.fit is Fit.STRETCH, (
            name
        )  # resizing, as in Song and Kim, Algorithm 1, and as ViCrop's boxes assume
        assert preset.warning is None
        for fit in ("stretch", "pad"):
            assert preset.with_overrides(fit=fit).warning is None
        hint = preset.with_overrides(fit="crop").warning
        assert hint is not None
        assert "middle square" in hint


def test_templates_that_say_how_to_answer_are_marked() -> None:
    for name, preset in load_presets().items():
        words = re.compile("short|single", re.IGNORECASE)
        asks = {key for key, text in preset.prompts.items() if words.search(text)}
        assert asks == set(preset.instructed), name
        for prompt in preset.prompts:
            changed = preset.with_overrides(prompt=prompt)
            assert changed.says_how_to_answer == (prompt in asks)


def test_an_unknown_template_in_instructed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt is named 'short'"):
        preset_from(MINIMAL + "instructed: [short]\n", tmp_path)


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5"),
        ("llava-hf/llava-1.5-13b-hf", "llava-1.5"),
        ("/srv/models/llava-1.5-7b-hf", "llava-1.5"),
        ("out/demo_model", "demo"),
    ],
)
def test_names_find_their_preset(model: str, preset: str) -> None:
    assert preset_for_model(model) == preset_named(preset)


def test_other_names_find_none() -> None:
    assert preset_for_model("Qwen/Qwen2-VL-7B-Instruct") is None
    assert preset_for_model("/srv/models/demo") is None


def test_defaults_fill_what_a_file_leaves_out(tmp_path: Path) -> None:
    preset = preset_from(MINIMAL, tmp_path)
    assert preset.policy() == ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5, k=5)
    assert preset.base_px is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("layers: 3", "layers"),
        ("layer: deep", r"\$\.layer"),
        ("layer: -1", r"\$\.layer"),
        ("fit: squash", r"\$\.fit"),
        ("ratios: []", r"\$\.ratios"),
        ("ratios: [1.0, 0]", r"\$\.ratios\[1\]"),
        ("quality: 101", r"\$\.quality"),
        ("eta: '0.5'", r"\$\.eta"),
        ("eta: -1", r"\$\.eta"),
        ("metric: vibes", r"\$\.metric"),
        ("{metric: margin, eta: 2}", "between 0 and 1"),
        ("max_new_tokens: 0", r"\$\.max_new_tokens"),
        ("prompt: other", "no prompt is named 'other'"),
        ("prompts: {chat: 'no slots'}", "once each"),
        ("prompts: {chat: '{question} <image>'}", "before"),
        ("prompts: {chat: '<image><image>{question}'}", "once each"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_with_file_and_key(
    line: str, complaint: str, tmp_path: Path
) -> None:
    import yaml

    fields = {**yaml.safe_load(MINIMAL), **yaml.safe_load(line)}
    with pytest.raises(ConfigError, match=complaint) as caught:
        preset_from(yaml.safe_dump(fields), tmp_path)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("family: [", "not YAML"),
        ("", "Expected `object`, got `null`"),
        ("just words", "Expected `object`"),
        (MINIMAL.replace("layer: 14\n", ""), "missing required field `layer`"),
    ],
)
def test_broken_files_are_refused_in_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        preset_from(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_preset(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no model presets"):
        load_presets(tmp_path)
    with pytest.raises(ConfigError, match=r"no preset 'none'; there are: .*demo"):
        preset_named("none")
    with pytest.raises(ConfigError, match=r"docs/models\.md"):
        preset_for_family("none")


def test_overrides_are_checked_like_the_file() -> None:
    demo = preset_named("demo")
    assert demo.with_overrides(layer=None, eta=None) == demo
    changed = demo.with_overrides(layer=2, eta=0.25, metric="margin", ratios=[1.0, 1.5])
    assert (changed.layer, changed.eta, changed.metric) == (2, 0.25, Metric.MARGIN)
    assert changed.ratios == (1.0, 1.5)
    for wrong in ({"layer": -1}, {"metric": "margin", "eta": 1.5}, {"nonsense": 1}):
        with pytest.raises(ConfigError, match="model option"):
            demo.with_overrides(**wrong)


def test_presets_are_immutable() -> None:
    with pytest.raises(AttributeError):
        preset_named("demo").layer = 3  # type: ignore[misc]


def test_the_folder_is_found_in_a_checkout() -> None:
    assert (config_folder() / "models" / "demo.yaml").is_file()


def test_impossible_options_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="model option"):
        open_model("demo", eta=-1.0)
    with pytest.raises(ConfigError, match="no preset 'none'"):
        open_model("demo", preset="none")


def test_no_model_runtime_is_imported_with_presets_and_names() -> None:
    code = (
        "import sys, server_plugin.backends.open, server_plugin.models.presets;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
