"""The demo model's configuration and the model itself, untrained."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from eval.demo_model.recipe import Recipe
from eval.demo_model.words import BOS, EOS, IMAGE, PAD, build_tokenizer


def llava_config(recipe: Recipe) -> LlavaConfig:
    """LLaVA configuration of a recipe, in the form of the hub's LLaVA-1.5 checkpoints."""
    text: dict[str, Any] = {
        **recipe.text,
        "vocab_size": len(build_tokenizer()),
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**recipe.vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(recipe.vision["image_size"] // recipe.vision["patch_size"]) ** 2,
        tie_word_embeddings=False,
    )


def build_model(recipe: Recipe) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    return LlavaForConditionalGeneration(llava_config(recipe))
