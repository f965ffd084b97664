"""Small InstructBLIP checkpoints with random weights, real tokenizers and image processors.

Nothing is downloaded: both tokenizers are made of a few sentences on the spot. They have the
peculiarities of the hub's: the decoder's writes `</s>` for beginning, end and unknown, and the
Q-Former's is a lower-casing WordPiece with an added `[DEC]`. Weights are drawn with gains that
keep pictures, questions, query tokens and patches distinguishable in every layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece
from transformers import (
    AddedToken,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
_QFORMER_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_SENTENCES = (
    "Question: what is written on the large red sign? Short answer: seven",
    "which number stands below the small blue door? forty two",
    "Write a general description of the image.",
    "the quick brown fox jumps over the lazy dog, then reads 0123456789 aloud!",
)


@dataclass(frozen=True, kw_only=True)
class TinyInstructBlip:
    """Shape of a small checkpoint. Sizes in px, widths in units of the hidden state."""

    view_px: int = 224
    patch_px: int = 14
    vision_hidden: int = 32
    vision_layers: int = 2
    query_tokens: int = 32
    qformer_hidden: int = 32
    qformer_layers: int = 6
    qformer_tokens: int = 96
    cross_attention_every: int = 2
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 4
    hidden: int = 64
    intermediate: int = 128
    context_tokens: int = 384
    vocabulary: int = 320
    sharpness: float = 1.6
    """Gain of query and key weights: how peaked attention is."""
    output_gain: float = 2.5
    """Spread of the logits."""
    end_tokens: tuple[int, ...] = (2,)
    seed: int = 0


def save_tiny_instructblip(folder: Path, shape: TinyInstructBlip | None = None) -> Path:
    """Build a checkpoint and save it as a user would; returns the folder."""
    shape = shape or TinyInstructBlip()
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": shape.view_px, "width": shape.view_px}),
        _tokenizer(shape.vocabulary),
        _qformer_tokenizer(),
        num_query_tokens=shape.query_tokens,
    )
    _model(shape, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", _SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="[PAD]",
    )


def _qformer_tokenizer() -> PreTrainedTokenizerFast:
    # A fixed vocabulary: the library's WordPiece training gives different ids in every run.
    words = sorted(
        {word for text in _SENTENCES for word in re.findall(r"\w+|[^\w\s]", text.lower())}
    )
    letters = sorted({letter for word in words for letter in word})
    pieces = [*_QFORMER_SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[
            (token, _QFORMER_SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        # Unlike the others, it is searched for in the lower-cased text.
        bos_token=AddedToken("[DEC]", normalized=True),
    )


def _model(
    shape: TinyInstructBlip, processor: InstructBlipProcessor
) -> InstructBlipForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=2 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=2,
            image_size=shape.view_px,
            patch_size=shape.patch_px,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(processor.qformer_tokenizer),
            hidden_size=shape.qformer_hidden,
            num_hidden_layers=shape.qformer_layers,
            num_attention_heads=4,
            intermediate_size=2 * shape.qformer_hidden,
            max_position_embeddings=shape.qformer_tokens,
            cross_attention_frequency=shape.cross_attention_every,
            encoder_hidden_size=shape.vision_hidden,
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
            # `generate` reads the end token here, not in `generation_config.json`.
            eos_token_id=list(shape.end_tokens),
            pad_token_id=tokenizer.pad_token_id,
        ),
        num_query_tokens=shape.query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    _draw_weights(model, shape)
    return model


def _draw_weights(model: InstructBlipForConditionalGeneration, shape: TinyInstructBlip) -> None:
    random = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower():
                continue  # norms stay one and zero
            if name.endswith("bias"):
                weight.normal_(0.0, 0.1, generator=random)
                continue
            gain = 1.0
            if any(part in name for part in ("q_proj", "k_proj", ".query.", ".key.", ".qkv.")):
                gain = shape.sharpness
            elif "lm_head" in name:
                gain = shape.output_gain
            looked_up = "embeddings.weight" in name or "embed_tokens" in name or weight.ndim == 3
            fan_in = 1 if looked_up else weight[0].numel()
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)
