"""Words of the demo model: its tokenizer, the prompt template, and the sentences it learns.

The tokenizer is byte-level BPE, so it encodes any text. Its merges are learned from the sentences
of the generated benchmark, so that these are short. Digits never merge: "47" is two tokens, and the
answer has one uncertainty per digit.
"""

from __future__ import annotations

import itertools

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eval.signs.scenes import COLOURS, LINE_WORDS, SHAPES, TINTS, Scene

PREFIX = "USER: "
TEMPLATE = "USER: {images}\n{question} ASSISTANT:"
GENERIC = "Write a general description of the image."
LIST_SIGNS = "list the signs."
COUNT_SIGNS = "how many signs are there?"
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
VOCABULARY = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT:{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] if content['type'] == 'image' %}<image>{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% endif %}{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def presence_question(colour: str, shape: str) -> str:
    """The question whether there is such a sign."""
    return f"is there a {colour} {shape}?"


def sign_list(scene: Scene) -> str:
    """All signs with their texts, from top to bottom."""
    ordered = sorted(scene.signs, key=lambda sign: sign.centre[1])
    return ", ".join(f"{sign.name} {sign.text}" for sign in ordered)


def easy_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question for which the global view suffices, with its answer."""
    if rng.random() < 0.3:
        return COUNT_SIGNS, str(len(scene.signs))
    if rng.random() < 0.5:
        sign = scene.signs[int(rng.integers(len(scene.signs)))]
        return presence_question(sign.colour, sign.shape), "yes"
    present = {(sign.colour, sign.shape) for sign in scene.signs}
    while True:
        pair = list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(5))]
        if pair not in present:
            return presence_question(*pair), "no"


def _corpus() -> list[str]:
    """All words of the benchmark, in sentences of it."""
    names = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    lines = [f"{tint} background with {count} lines." for tint in TINTS for count in LINE_WORDS]
    lines += [LIST_SIGNS, COUNT_SIGNS, GENERIC, "yes", "no"] * 20
    for name in names:
        lines += [f"what number is on the {name}?", f"is there a {name}?", f"{name} 1, {name} 2"]
    prompts = [TEMPLATE.format(images="", question=line) for line in lines]
    return lines + prompts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; every call gives the same one."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Vocabulary:
    """Token ids of prompts and answers, with a cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.tokenizer = tokenizer or build_tokenizer()
        self._seen: dict[str, list[int]] = {}

    def plain(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        if text not in self._seen:
            self._seen[text] = list(self.tokenizer.encode(text, add_special_tokens=False))
        return self._seen[text]

    def prefix(self) -> list[int]:
        """Ids of ``<s>USER: ``, which come before the global view's visual tokens."""
        return [BOS, *self.plain(PREFIX)]

    def suffix(self, question: str) -> list[int]:
        """Ids of the prompt after the visual tokens."""
        return self.plain(f"\n{question} ASSISTANT:")

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with the end token."""
        return [*self.plain(text), EOS]
