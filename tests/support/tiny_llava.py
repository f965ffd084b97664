"""Small LLaVA checkpoints with random weights, real tokenizers and image processors.

Nothing is downloaded: the tokenizer is trained on a few sentences on the spot. Attention of a
freshly initialised decoder is nearly uniform and its answers nearly constant, so comparisons on
it could hardly fail; weights are therefore drawn with gains that keep pictures, questions and
positions distinguishable in every layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

_SENTENCES = (
    "USER: what is written on the large red sign? ASSISTANT: seven",
    "USER: which number stands below the small blue door? ASSISTANT: forty two",
    "Write a general description of the image.",
    "Answer the question using a single word or phrase.",
    "the quick brown fox jumps over the lazy dog, then reads 0123456789 aloud!",
)


@dataclass(frozen=True, kw_only=True)
class TinyLlava:
    """Shape of a small checkpoint. Sizes in px, widths in units of the hidden state."""

    view_px: int = 112
    patch_px: int = 14
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 4
    hidden: int = 64
    intermediate: int = 128
    vision_hidden: int = 32
    vision_layers: int = 3
    context_tokens: int = 512
    vocabulary: int = 320
    stretch: bool = True
    feature_strategy: str = "default"
    sharpness: float = 1.6
    """Gain of query and key weights: how peaked attention is."""
    output_gain: float = 2.5
    """Spread of the logits."""
    end_tokens: tuple[int, ...] = (2,)
    seed: int = 0


def save_tiny_llava(folder: Path, shape: TinyLlava | None = None) -> Path:
    """Build a checkpoint and save it as a user would; returns the folder."""
    shape = shape or TinyLlava()
    tokenizer = _tokenizer(shape.vocabulary)
    processor = LlavaProcessor(
        image_processor=_image_processor(shape),
        tokenizer=tokenizer,
        patch_size=shape.patch_px,
        vision_feature_select_strategy=shape.feature_strategy,
        num_additional_image_tokens=1,
    )
    model = _model(shape, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rename_family(folder: Path, model_type: str) -> None:
    """Make a saved checkpoint claim another architecture."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = model_type
    path.write_text(json.dumps(config))


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def _image_processor(shape: TinyLlava) -> CLIPImageProcessor:
    square = {"height": shape.view_px, "width": shape.view_px}
    return CLIPImageProcessor(
        size=square if shape.stretch else {"shortest_edge": shape.view_px},
        crop_size=square,
        do_center_crop=not shape.stretch,
    )


def _model(shape: TinyLlava, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=2 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=2,
            image_size=shape.view_px,
            patch_size=shape.patch_px,
            projection_dim=shape.vision_hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=shape.context_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        vision_feature_select_strategy=shape.feature_strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    _draw_weights(model, shape)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(shape.end_tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _draw_weights(model: LlavaForConditionalGeneration, shape: TinyLlava) -> None:
    random = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue  # biases stay zero and norms one
            gain = 1.0
            if "q_proj" in name or "k_proj" in name:
                gain = shape.sharpness
            elif name.startswith("lm_head"):
                gain = shape.output_gain
            fan_in = 1 if "embed" in name and "patch" not in name else weight[0].numel()
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)
