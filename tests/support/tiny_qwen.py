"""Small Qwen2.5-VL checkpoints with random weights, in the files that the hub's have.

Nothing is downloaded: the tokenizer, of the real class, is trained on a few sentences on the spot.
As in `tiny_llava`, weights are drawn with gains that keep pictures, questions and positions
distinguishable in every layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
"""Added to the vocabulary as on the hub, but not as special tokens."""

NORMALISED_TOKEN = "<Kind>"
"""A token that is searched for in the normalised text, as fine-tuned checkpoints may have."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Gives the same result as the hub checkpoint's template for pictures and text."""

_SENTENCES = (
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "what is written on the large red sign? seven",
    "which number stands below the small blue door? forty two",
    "Write a general description of the image.",
    "Answer the question using a single word or phrase.",
    "the quick brown fox jumps over the lazy dog, then reads 0123456789 aloud!",
)


@dataclass(frozen=True, kw_only=True)
class TinyQwen:
    """Shape of a small checkpoint. Widths in units of the hidden state."""

    layers: int = 4
    heads: int = 4
    key_value_heads: int = 4
    hidden: int = 64
    intermediate: int = 128
    mrope_section: tuple[int, int, int] = (2, 3, 3)
    """Rotary frequencies of a head that follow time, row and column; half a head's width."""
    vision_hidden: int = 32
    vision_layers: int = 3
    context_tokens: int = 1024
    vocabulary: int = 360
    tied: bool = False
    """Whether the output head is the embedding table, as in the 3B checkpoint."""
    sharpness: float = 1.6
    """Gain of query and key weights: how peaked attention is."""
    output_gain: float = 2.5
    """Spread of the logits."""
    more_end_tokens: tuple[int, ...] = ()
    """Ordinary tokens that also end an answer, so that some answers end early."""
    seed: int = 0


def save_tiny_qwen(folder: Path, shape: TinyQwen | None = None) -> Path:
    """Build a checkpoint and save it in the hub's layout; returns the folder."""
    shape = shape or TinyQwen()
    tokenizer = _tokenizer(shape.vocabulary)
    _model(shape, tokenizer).save_pretrained(folder)
    _flatten_config(folder)
    tokenizer.save_pretrained(folder)
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    return folder


def _flatten_config(folder: Path) -> None:
    """Bring `config.json` to the hub's older form, with the decoder's fields at the top."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types"):
        text.pop(name)
    for name in ("in_channels", "rope_parameters", "model_type"):
        config["vision_config"].pop(name)
    _write(
        folder / "config.json",
        text
        | config
        | {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
            # A window is configured but not used.
            "use_sliding_window": False,
            "sliding_window": 32,
            "max_window_layers": 1,
        },
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def _tokenizer(vocabulary: int) -> Qwen2Tokenizer:
    core = Tokenizer(BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    trained = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        + [AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS]
        + [AddedToken(NORMALISED_TOKEN, special=False, normalized=True)]
    )
    return tokenizer


def _model(shape: TinyQwen, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            # The hub's embedding tables also have unused rows.
            "vocab_size": len(tokenizer) + 7,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "max_position_embeddings": shape.context_tokens,
            # A small base: with so few frequencies, the last one would hardly rotate otherwise.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 20.0,
                "mrope_section": list(shape.mrope_section),
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 2 * shape.vision_hidden,
            "num_heads": 2,
            "out_hidden_size": shape.hidden,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    _draw_weights(model, shape)
    # As on the hub, except for values that only sampling uses.
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"], *shape.more_end_tokens],
        repetition_penalty=1.05,
    )
    return model


def _draw_weights(model: Qwen2_5_VLForConditionalGeneration, shape: TinyQwen) -> None:
    random = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                if name.endswith("bias"):
                    weight.normal_(0.0, 0.3, generator=random)
                continue  # norms stay one
            gain = 1.0
            if "q_proj" in name or "k_proj" in name:
                gain = shape.sharpness
            elif name.startswith("lm_head") or (shape.tied and "embed_tokens" in name):
                gain = shape.output_gain
            fan_in = weight[0].numel()
            if "embed_tokens" in name and not shape.tied:
                fan_in = 1
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    """Return a function that sets fields of a JSON file in a checkpoint's folder."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage
