"""Models for the benchmarks: checkpoints, or random weights in the sizes of a known model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from eval.demo_model.words import BOS, EOS, IMAGE, PAD, build_tokenizer
from server_plugin.backends.transformers.adapters.checkpoint import (
    load_model,
    load_processor,
    local_or_hub,
    model_type_of,
)
from server_plugin.backends.transformers.adapters.llava import LlavaAdapter
from server_plugin.backends.transformers.adapters.registry import adapter_for
from server_plugin.models.presets import Preset, preset_for_family, preset_for_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of a LLaVA model; views of 336 px give 576 visual tokens in all of them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    layer: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int


SHAPES = {
    "shapes-7b": Shapes(
        layers=32, hidden=4096, intermediate=11008, heads=32, vocabulary=32064, layer=14,
        vision_layers=24, vision_hidden=1024, vision_heads=16,
    ),
    # A quarter of the depth and of the width; the vision tower has the same share of the work.
    "shapes-small": Shapes(
        layers=8, hidden=1024, intermediate=2752, heads=8, vocabulary=8016, layer=3,
        vision_layers=6, vision_hidden=256, vision_heads=4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that both sides of a benchmark use."""

    model: Any
    processor: Any
    preset: Preset


def random_subject(shapes: Shapes, device: torch.device, dtype: torch.dtype, seed: int) -> Subject:
    """Make a model of these shapes with random weights on the device."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shapes.vision_hidden,
            intermediate_size=4 * shapes.vision_hidden,
            num_hidden_layers=shapes.vision_layers,
            num_attention_heads=shapes.vision_heads,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=shapes.vocabulary,
            hidden_size=shapes.hidden,
            intermediate_size=shapes.intermediate,
            num_hidden_layers=shapes.layers,
            num_attention_heads=shapes.heads,
            num_key_value_heads=shapes.heads,
            max_position_embeddings=4096,
        ),
        image_token_id=IMAGE,  # type: ignore[call-arg]
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        model.eval()
        random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue  # biases stay zero and norms one
            # Sharp enough that attention, and with it map and answers, depend on the inputs.
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
            fan_in = 1 if "embed" in name and "patch" not in name else weight[0].numel()
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
    )
    square = {"height": 336, "width": 336}
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer=build_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    preset = preset_for_family("llava").with_overrides(layer=shapes.layer, fit="stretch")
    return Subject(model, processor, preset)


def loaded_subject(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """Load a checkpoint.

    Raises:
        SystemExit: the straightforward pipeline does not support its family.
    """
    source = local_or_hub(name)
    adapter = adapter_for(model_type_of(source))
    if adapter is not LlavaAdapter:
        raise SystemExit(
            f"{name} belongs to the family {adapter.family}; the pipeline supports llava only"
        )
    preset = (preset_for_model(name) or preset_for_family(adapter.family)).with_overrides(
        fit="stretch"
    )
    return Subject(load_model(source, device, dtype), load_processor(source), preset)


def shapes_of(subject: Subject) -> dict[str, int]:
    """The model's sizes, for the result."""
    text = subject.model.config.text_config
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "vocabulary": text.vocab_size,
        "layer": subject.preset.layer,
    }
