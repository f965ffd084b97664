"""Write the checkpoint folder: ``python -m eval.demo_model.export --run runs/demo --stage S``.

The weights have the key names of the hub's ``llava-hf/llava-1.5-7b-hf``, which transformers and
vLLM both read. transformers' ``save_pretrained`` would omit a level of the vision tower's names
that vLLM expects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eval.demo_model.build import build_model, llava_config
from eval.demo_model.recipe import Recipe, load_recipe
from eval.demo_model.words import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    SPECIAL,
    build_tokenizer,
)

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "vlm_collab_demo" / "demo_model"

# transformers' names in memory -> the hub's names on disk.
_HUB_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def hub_name(name: str) -> str:
    """The hub's name of a parameter that transformers calls ``name``.

    Raises:
        ValueError: if no rule covers it.
    """
    for ours, hub in _HUB_NAMES:
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise ValueError(f"no hub name for the parameter {name!r}")


def hub_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to bfloat16 under the hub's names, each a contiguous array."""
    return {hub_name(k): v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}


# transformers writes these into every configuration; they do not describe this model.
_NOT_OURS = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
)


def _config(recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = llava_config(recipe).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    for part in (config, text, vision):
        for key in _NOT_OURS:
            part.pop(key, None)
        part["dtype"] = part["torch_dtype"] = "bfloat16"
    text["architectures"] = ["LlamaForCausalLM"]
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]  # for older readers
    config.update(
        architectures=["LlavaForConditionalGeneration"],
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return config


def _image_processor(side: int) -> dict[str, Any]:
    """Image processor: stretch to the encoder's square, scale to [-1, 1]."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "padding_side": "left",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(number): {
                "content": text,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": True,
            }
            for number, text in enumerate(SPECIAL)
        },
    }


def write_checkpoint(recipe: Recipe, state: dict[str, Tensor], folder: Path) -> None:
    """Write all files of the checkpoint except the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe)
    model.load_state_dict(state)  # strict: nothing missing, nothing over
    save_file(
        hub_weights(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "model.safetensors").chmod(0o644)
    build_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    vision = recipe.vision
    files: dict[str, dict[str, Any]] = {
        "config.json": _config(recipe),
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "do_sample": False,
            "max_new_tokens": 64,
        },
        "tokenizer_config.json": _tokenizer_config(),
        "preprocessor_config.json": _image_processor(vision["image_size"]),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": "default",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def curve(run: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Validation lines of a run's learning curve, for these stages."""
    lines = (run / "curve.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [
        point
        for point in points
        if point["stage"] in stages and any(k.startswith("val_") or k == "first" for k in point)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training")
    parser.add_argument("--stage", required=True, help="decoder stage to export")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    saved = torch.load(options.run / f"{options.stage}.pt", map_location="cpu", weights_only=True)
    recipe = load_recipe(options.recipe)
    write_checkpoint(recipe, saved["model"], options.out)
    names = [stage.name for stage in recipe.stages]
    done = names[: names.index(recipe.stage(options.stage).name) + 1]
    rows = [json.dumps(point) for point in curve(options.run, done)]
    (options.out / "training-curve.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    size = sum(f.stat().st_size for f in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
