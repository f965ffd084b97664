"""Conversations, several pictures, none, and sampled answers, compared with Transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from server_plugin.backends.base import GenerationRequest, Sampling
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.backends.transformers.sampling import Chooser, surprisal
from server_plugin.models.presets import preset_named
from tests.support.oracle import Oracle, compare_answer, picture
from tests.support.oracle_instructblip import InstructBlipOracle
from tests.support.oracle_qwen import QwenOracle
from tests.support.tiny_instructblip import TinyInstructBlip, save_tiny_instructblip
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from tests.support.tiny_qwen import TinyQwen, save_tiny_qwen
from vlm_collab.errors import ConfigError, QuestionError
from vlm_collab.geometry import Size

NEW_TOKENS = 8
ASKED = "which of them is larger?"
SAID = (("what is on the sign?", "a red bus"), ("and below it?", ""))
GENERIC = "Write a general description of the image."

# ---- LLaVA: conversations, several pictures, no picture -----------------------------------------

Pair = tuple[TransformersBackend, Oracle]


class Talk(Oracle):
    """The oracle for any number of pictures, in the checkpoint's chat form."""

    history: tuple[tuple[str, str], ...] = ()

    def inputs(self, question: str, *pictures: Image.Image) -> Any:
        questions = [*(turn[0] for turn in self.history), question]
        line_break = "\n" if pictures else ""
        text = f"USER: {'<image>' * len(pictures)}{line_break}{questions[0]} ASSISTANT:"
        for (_, answer), following in zip(self.history, questions[1:], strict=True):
            text += f" {answer} USER: {following} ASSISTANT:"
        return self.processor(text=text, images=list(pictures) or None, return_tensors="pt")

    def rows(self, question: str, layer: int, *pictures: Image.Image) -> np.ndarray:
        inputs = self.inputs(question, *pictures)
        with torch.inference_mode():
            weights = self.eager(**inputs, output_attentions=True).attentions[layer]
        on_image = inputs["input_ids"][0] == self.model.config.image_token_id
        return weights[0, :, -1].mean(dim=0)[on_image].double().numpy()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TransformersBackend, Talk]]:
    shape = TinyLlava(end_tokens=(2, 44, 202, 8), seed=4)
    folder = save_tiny_llava(tmp_path_factory.mktemp("llava"), shape)
    preset = msgspec.structs.replace(preset_named("demo"), base_px=None, epsilon=0.0)
    backend = TransformersBackend.load(
        str(folder), preset.with_overrides(layer=1, max_new_tokens=NEW_TOKENS), device="cpu"
    )
    yield backend, Talk.of(folder)
    asyncio.run(backend.close())


def random_views(backend: TransformersBackend, count: int, seed: int = 0) -> list[Image.Image]:
    return [picture(seed + i, backend.info.view) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_conversations_about_pictures_equal_plain_transformers(count, turns, llava):
    backend, oracle = llava
    oracle.history = SAID[:turns]
    request = GenerationRequest(ASKED, history=SAID[:turns], max_new_tokens=NEW_TOKENS)
    images = random_views(backend, count, seed=10 * turns)
    view = await backend.open_view(*images)
    first = await backend.first_pass(view, request)
    compare_answer(first, oracle.answer(ASKED, *images, max_new_tokens=NEW_TOKENS))
    expected = oracle.rows(ASKED, backend.info.layer, *images)
    assert first.row is not None
    np.testing.assert_allclose(first.row, expected, rtol=1e-4, atol=0)

    relative = await backend.relative_attention(view, first)
    oracle.history = ()
    ratio = expected / oracle.rows(GENERIC, backend.info.layer, *images)
    assert len(relative.maps) == count
    maps = np.stack(relative.maps).reshape(-1)
    np.testing.assert_allclose(maps, ratio, rtol=1e-4, atol=0)

    oracle.history = SAID[:turns]
    region = picture(99, Size(200, 100))
    second = await backend.second_pass(view, region, request)
    compare_answer(second, oracle.answer(ASKED, *images, region, max_new_tokens=NEW_TOKENS))
    await backend.release(view)


async def test_a_later_turn_computes_only_text(llava):
    backend, _ = llava
    view = await backend.open_view(*random_views(backend, 2))
    first = await backend.first_pass(view, GenerationRequest(SAID[0][0], max_new_tokens=1))
    later = await backend.first_pass(view, GenerationRequest(ASKED, max_new_tokens=1, history=SAID))
    visual = 2 * backend.info.visual_tokens
    assert first.prefilled_tokens > visual
    assert later.prefilled_tokens == later.context_tokens - visual - 4 < visual // 2


@pytest.mark.parametrize("turns", [0, 2])
async def test_questions_about_no_picture_equal_plain_transformers(turns, llava):
    backend, oracle = llava
    oracle.history = SAID[:turns]
    answer = await backend.text_pass(
        GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS, history=SAID[:turns])
    )
    ids, text, logits = oracle.answer(ASKED, max_new_tokens=NEW_TOKENS)
    compare_answer(answer, (ids, text, logits))
    assert answer.row is None


async def test_different_questions_run_together(llava):
    backend, _ = llava
    one = await backend.open_view(*random_views(backend, 1))
    two = await backend.open_view(*random_views(backend, 2))

    async def passes() -> list[Any]:
        request = GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS)
        drawn = replace(request, question="what?", sampling=Sampling(temperature=1, seed=3))
        return [
            backend.first_pass(one, request),
            backend.first_pass(two, request),
            backend.first_pass(one, replace(request, history=SAID)),
            backend.second_pass(one, picture(5, Size(90, 90)), request),
            backend.text_pass(request),
            backend.first_pass(one, drawn),
        ]

    alone = [await one for one in await passes()]
    together = await asyncio.gather(*await passes())
    for got, expected in zip(together, alone, strict=True):
        assert got.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("history", "complaint"),
    [
        ((("", "yes"),), "an earlier question is empty"),
        ((("what?", "a \ud800"),), "an earlier answer is not valid Unicode"),
        ((("word " * 3000, "yes"),), "far longer|too long"),
    ],
)
def test_earlier_turns_are_checked_too(history, complaint, llava):
    with pytest.raises(QuestionError, match=complaint):
        llava[0].check_question(GenerationRequest(ASKED, history=history))


def test_too_many_pictures_for_the_context(llava):
    most = llava[0].info.context_tokens // llava[0].info.visual_tokens
    with pytest.raises(QuestionError, match="exceed"):
        llava[0].check_question(GenerationRequest(ASKED), most + 1)


# ---- the other families -------------------------------------------------------------------------


async def test_qwen_with_several_pictures_and_turns(tmp_path):
    folder = save_tiny_qwen(tmp_path, TinyQwen())
    preset = preset_named("qwen2.5-vl").with_overrides(
        layer=1, max_new_tokens=NEW_TOKENS, view_px=224
    )
    backend = TransformersBackend.load(str(folder), preset, device="cpu")
    oracle = QwenOracle.of(folder, Size(224, 224))

    def messages(question: str, *pictures: Image.Image) -> Any:
        questions = [*(turn[0] for turn in SAID), question]
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in pictures]
        talk: list[dict[str, Any]] = []
        for number, text in enumerate(questions):
            content.append({"type": "text", "text": text})
            talk.append({"role": "user", "content": content})
            if number < len(SAID):
                said = [{"type": "text", "text": SAID[number][1]}]
                talk.append({"role": "assistant", "content": said})
            content = []
        return oracle.processor.apply_chat_template(
            talk, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    oracle.inputs = messages  # type: ignore[method-assign]
    images = random_views(backend, 2)
    view = await backend.open_view(*images)
    request = GenerationRequest(ASKED, history=SAID, max_new_tokens=NEW_TOKENS)
    first = await backend.first_pass(view, request)
    compare_answer(first, oracle.answer(ASKED, *images, max_new_tokens=NEW_TOKENS))
    inputs = messages(ASKED, *images)
    with torch.inference_mode():
        weights = oracle.eager(**inputs, output_attentions=True).attentions[1]
    on_image = inputs["input_ids"][0] == oracle.model.config.image_token_id
    expected = weights[0, :, -1].mean(dim=0)[on_image].numpy()
    np.testing.assert_allclose(first.row, expected, rtol=1e-4, atol=0)
    region = picture(7, Size(224, 224))
    second = await backend.second_pass(view, region, request)
    compare_answer(second, oracle.answer(ASKED, *images, region, max_new_tokens=NEW_TOKENS))
    await backend.close()


async def test_instructblip_with_several_pictures(tmp_path):
    folder = save_tiny_instructblip(tmp_path, TinyInstructBlip())
    preset = preset_named("instructblip").with_overrides(layer=1, max_new_tokens=NEW_TOKENS)
    backend, _ = open_model(str(folder), preset=preset, device="cpu", dtype="float32")
    oracle = InstructBlipOracle.of(folder)
    images = random_views(backend, 2)
    view = await backend.open_view(*images)
    first = await backend.first_pass(view, GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS))
    compare_answer(first, oracle.answer_by_hand(ASKED, *images, max_new_tokens=NEW_TOKENS))
    relative = await backend.relative_attention(view, first)
    assert [one.shape for one in relative.maps] == [backend.info.grid] * 2
    region = picture(7, Size(100, 60))
    second = await backend.second_pass(
        view, region, GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS)
    )
    compare_answer(second, oracle.answer_by_hand(ASKED, *images, region, max_new_tokens=NEW_TOKENS))
    with pytest.raises(QuestionError, match="single questions only"):
        await backend.first_pass(
            view, GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS, history=SAID)
        )
    await backend.close()


# ---- sampling -----------------------------------------------------------------------------------


async def test_the_same_seed_gives_the_same_answer(llava):
    backend, _ = llava
    view = await backend.open_view(*random_views(backend, 1))

    async def draw(seed: int | None) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.5, seed=seed)
        answer = await backend.first_pass(
            view, GenerationRequest(ASKED, max_new_tokens=NEW_TOKENS, sampling=sampling)
        )
        assert len(answer.surprisals) == len(answer.token_ids)
        return answer.token_ids

    assert await draw(1) == await draw(1)
    assert len({await draw(seed) for seed in range(6)}) > 3


async def test_statistics_and_surprisals_of_drawn_tokens_are_of_the_raw_logits(llava):
    backend, oracle = llava
    oracle.history = ()
    image = random_views(backend, 1)[0]
    view = await backend.open_view(image)
    drawn = await backend.first_pass(
        view, GenerationRequest(ASKED, max_new_tokens=4, sampling=Sampling(temperature=2.0, seed=5))
    )
    inputs = oracle.inputs(ASKED, image)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([drawn.token_ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = oracle.model(**inputs).logits[0, length - 1 : -1].double()
    log2 = torch.log_softmax(logits, -1) / np.log(2)
    for step, bits, row, token in zip(
        drawn.steps, drawn.surprisals, log2, drawn.token_ids, strict=True
    ):
        assert step.min_entropy_bits == pytest.approx(-row.max().item(), abs=1e-5)
        assert bits == pytest.approx(-row[token].item(), abs=1e-5)
    assert any(
        bits > step.min_entropy_bits + 0.1
        for bits, step in zip(drawn.surprisals, drawn.steps, strict=True)
    )


def test_draws_follow_the_tempered_distribution():
    logits = np.array([2.0, 1.0, 0.0, -1.0], dtype=np.float32)
    chooser = Chooser(Sampling(temperature=2.0, seed=0))
    drawn = np.bincount([chooser.choose(logits) for _ in range(20_000)], minlength=4) / 20_000
    expected = np.exp(logits / 2)
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.012)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.65, {0, 1}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_that_is_likely_enough(top_p, kept):
    logits = np.log(np.array([0.6, 0.3, 0.08, 0.02]))
    chooser = Chooser(Sampling(temperature=1.0, top_p=top_p, seed=0))
    drawn = {chooser.choose(logits) for _ in range(2000)}
    assert drawn == kept


def test_greedy_takes_the_first_of_equally_likely_tokens():
    assert Chooser(Sampling()).choose(np.array([1.0, 3.0, 3.0])) == 1
    assert surprisal(np.array([0.0, 0.0]), 1) == pytest.approx(1.0)


def test_turns_need_their_slots():
    for turn in ("no slots", "{question} {answer}", "{answer} <image> {question}"):
        with pytest.raises(ConfigError, match="turn"):
            preset_named("demo").with_overrides(turns={"chat": turn})
