"""Pictures at their places in a conversation's texts: plain transformers as the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import open_model
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.models.presets import preset_named
from tests.support.batches import queued, together
from tests.support.oracle import Oracle, compare_answer, picture
from tests.support.oracle_instructblip import InstructBlipOracle
from tests.support.oracle_qwen import QwenOracle
from tests.support.tiny_instructblip import TinyInstructBlip, save_tiny_instructblip
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from tests.support.tiny_qwen import TinyQwen, save_tiny_qwen
from vlm_collab.errors import QuestionError
from vlm_collab.geometry import Size
from vlm_collab.protocol.image_positions import (
    Place,
    Places,
    join_parts,
    places_in_turn,
    split_at_pictures,
)

NEW_TOKENS = 8
GENERIC = "Write a general description of the image."

Parts = list[str | int]
Talk = list[tuple[Parts, str]]

LABELS: Parts = ["Image 1:", 0, "\nImage 2:", 1, "\nwhich is larger?"]
OPENING: Parts = [0, "is the first. ", 1, "is the second. which?"]
BEHIND: Parts = ["what do these show? ", 0, 1]
AGAIN: Parts = ["compare ", 0, " with ", 1, " and again ", 0, "."]
EARLIER: Talk = [([0, "what is this?"], "a red bus"), (["and ", 1, " this?"], "")]
CASES: dict[str, tuple[Talk, Parts]] = {
    "labels": ([], LABELS),
    "opening": ([], OPENING),
    "behind": ([], BEHIND),
    "again": ([], AGAIN),
    "swapped": ([], [1, "comes before ", 0, " here"]),
    "turns": (EARLIER, ["which of them is larger?"]),
    "turns and again": (EARLIER, ["is ", 1, " the same as before?"]),
    "a later turn begins with one": ([([0, "what?"], "a bus")], [1, "and here?"]),
}


def conversation(talk: Talk, question: Parts) -> tuple[str, tuple[tuple[str, str], ...], Places]:
    """(question, history, places)."""
    turns = [join_parts(parts) for parts in (*(each for each, _ in talk), question)]
    places = tuple(Place(i, *spot) for i, (_, spots) in enumerate(turns) for spot in spots)
    history = tuple((turns[i][0], answer) for i, (_, answer) in enumerate(talk))
    return turns[-1][0], history, places


def local_behind(places: Places, of: int, number: int) -> Places:
    """Places with a local view after the last place of a picture."""
    last = max(i for i, place in enumerate(places) if place.picture == of)
    local = places[last]._replace(picture=number)
    return (*places[: last + 1], local, *places[last + 1 :])


class Llava(Oracle):
    """Oracle with the checkpoint's chat form, with `<image>` for each picture."""

    def set_turns(self, turns: Any, places: Places, pictures: list[Image.Image]) -> None:
        text = ""
        for turn, (question, answer) in enumerate(turns):
            spots = places_in_turn(places, turn)
            opening = sum(position == 0 for position, _ in spots)
            pieces = [
                "<image>" if isinstance(p, int) else p for p in split_at_pictures(question, spots)
            ]
            # In this family's form, pictures at the beginning of a text have a line of their own.
            words = "".join(pieces[:opening]) + "\n" * bool(opening) + "".join(pieces[opening:])
            text += f"USER: {words} ASSISTANT:" + ("" if answer is None else f" {answer} ")
        self.text, self.images = text, [pictures[place.picture] for place in places]

    def inputs(self, question: str, *_: Image.Image) -> Any:
        return self.processor(text=self.text, images=self.images, return_tensors="pt")


class Qwen(QwenOracle):
    """Oracle with the checkpoint's chat template, with text and pictures in order."""

    def set_turns(self, turns: Any, places: Places, pictures: list[Image.Image]) -> None:
        self.talk: list[Any] = []
        for turn, (question, answer) in enumerate(turns):
            content = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {
                    "type": "image",
                    "image": pictures[part].resize(self.view, Image.Resampling.BICUBIC),
                }
                for part in split_at_pictures(question, places_in_turn(places, turn))
            ]
            self.talk.append({"role": "user", "content": content})
            if answer is not None:
                reply = [{"type": "text", "text": answer}]
                self.talk.append({"role": "assistant", "content": reply})

    def inputs(self, question: str, *_: Image.Image) -> Any:
        return self.processor.apply_chat_template(
            self.talk,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )


Pair = tuple[TransformersBackend, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    root = tmp_path_factory.mktemp("interleaved")
    llava = save_tiny_llava(root / "llava", TinyLlava(context_tokens=1024, seed=4))
    qwen = save_tiny_qwen(root / "qwen", TinyQwen())
    demo = msgspec.structs.replace(preset_named("demo"), base_px=None, epsilon=0.0)
    given: dict[str, Any] = {"layer": 1, "max_new_tokens": NEW_TOKENS}
    made: dict[str, Pair] = {
        "llava": (
            TransformersBackend.load(str(llava), demo.with_overrides(**given), device="cpu"),
            Llava.of(llava),
        ),
        "qwen": (
            TransformersBackend.load(
                str(qwen), preset_named("qwen2.5-vl").with_overrides(**given), device="cpu"
            ),
            Qwen.of(qwen, Size(224, 224)),
        ),
    }
    yield made
    for backend, _ in made.values():
        asyncio.run(backend.close())


def rows(oracle: Any, places: Places, layer: int, visual: int) -> np.ndarray:
    """Attention to each picture's tokens, summed over its places."""
    inputs = oracle.inputs("")
    with torch.inference_mode():
        weights = oracle.eager(**inputs, output_attentions=True).attentions[layer]
    on_image = inputs["input_ids"][0] == oracle.model.config.image_token_id
    runs = weights[0, :, -1].mean(dim=0)[on_image].double().numpy().reshape(-1, visual)
    return np.concatenate(
        [
            sum(run for run, place in zip(runs, places, strict=True) if place.picture == number)
            for number in (0, 1)
        ]
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llava", "qwen"])
async def test_interleaved_questions_equal_plain_transformers(family, case, pairs) -> None:
    backend, oracle = pairs[family]
    question, history, places = conversation(*CASES[case])
    turns = [*history, (question, None)]
    images = [picture(seed, backend.info.view) for seed in (1, 2)]
    region = picture(3, Size(120, 120))
    request = GenerationRequest(question, history=history, places=places, max_new_tokens=NEW_TOKENS)
    view = await backend.open_view(*images)
    visual = backend.info.visual_tokens

    first = await backend.first_pass(view, request)
    oracle.set_turns(turns, places, images)
    compare_answer(first, oracle.answer("", max_new_tokens=NEW_TOKENS))
    assert first.context_tokens == oracle.inputs("")["input_ids"].shape[1]
    expected = rows(oracle, places, backend.info.layer, visual)
    np.testing.assert_allclose(first.row, expected, rtol=1e-4, atol=0)

    # The generic row belongs to the view, with its pictures in front.
    relative = await backend.relative_attention(view, first)
    front = (Place(0, 0, 0), Place(0, 0, 1))
    oracle.set_turns([(GENERIC, None)], front, images)
    ratio = expected / rows(oracle, front, backend.info.layer, visual)
    np.testing.assert_allclose(np.stack(relative.maps).reshape(-1), ratio, rtol=2e-4, atol=0)

    for of in (0, 1):
        second = await backend.second_pass(view, region, request, picture=of)
        oracle.set_turns(turns, local_behind(places, of, 2), [*images, region])
        compare_answer(second, oracle.answer("", max_new_tokens=NEW_TOKENS))
    await backend.release(view)


@pytest.mark.parametrize("family", ["llava", "qwen"])
async def test_the_order_changes_the_answer(family, pairs) -> None:
    """Shows that the comparison above can fail."""
    backend, oracle = pairs[family]
    question, _, places = conversation([], LABELS)
    images = [picture(seed, backend.info.view) for seed in (1, 2)]
    view = await backend.open_view(*images)
    first = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=NEW_TOKENS))
    oracle.set_turns([(question, None)], places, images)
    with pytest.raises(AssertionError):
        compare_answer(first, oracle.answer("", max_new_tokens=NEW_TOKENS))
    await backend.release(view)


@pytest.mark.parametrize("family", ["llava", "qwen"])
async def test_the_shared_beginning_of_an_interleaved_prompt_is_not_computed_again(
    family, pairs
) -> None:
    backend, _ = pairs[family]
    view = await backend.open_view(*(picture(seed, backend.info.view) for seed in (1, 2)))
    visual, front = backend.info.visual_tokens, view.prefixes[""].length
    plain = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
    assert plain.prefilled_tokens == plain.context_tokens  # the cost of the view is reported once

    question, _, places = conversation([], OPENING)
    first = await backend.first_pass(
        view, GenerationRequest(question, max_new_tokens=1, places=places)
    )
    assert (
        visual
        < first.prefilled_tokens
        == first.context_tokens - (front - visual) + (0 if family == "llava" else 1)
    )
    question, _, places = conversation([], LABELS)
    first = await backend.first_pass(
        view, GenerationRequest(question, max_new_tokens=1, places=places)
    )
    assert 2 * visual < first.prefilled_tokens < first.context_tokens
    # It leaves no trace: the next plain question continues from the view's cache.
    plain = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
    assert plain.prefilled_tokens == plain.context_tokens - front
    assert list(view.prefixes) == [""]
    await backend.release(view)


@pytest.mark.parametrize("family", ["llava", "qwen"])
async def test_interleaved_questions_run_together_as_alone(family, pairs) -> None:
    backend, _ = pairs[family]
    view = await backend.open_view(*(picture(seed, backend.info.view) for seed in (1, 2)))
    set_turns = []
    for parts in (LABELS, ["Image 1 is here:", 0, "\nand Image 2 is here:", 1, "\nwell?"]):
        question, _, places = conversation([], parts)
        set_turns.append((question, places))
    set_turns.append(("which?", ()))

    def passes() -> list[Any]:
        return [
            backend.first_pass(view, GenerationRequest(question, max_new_tokens=4, places=places))
            for question, places in set_turns
        ]

    alone = [await one for one in passes()]
    with together(backend) as sizes:
        tasks = await queued(*passes())
    answers = await asyncio.gather(*tasks)
    assert sizes[0] == 2
    for got, expected in zip(answers, alone, strict=True):
        assert got.token_ids == expected.token_ids
        np.testing.assert_allclose(got.row, expected.row, rtol=1e-4)
    await backend.release(view)


async def test_instructblip_takes_pictures_in_front(tmp_path) -> None:
    folder = save_tiny_instructblip(tmp_path, TinyInstructBlip())
    preset = preset_named("instructblip").with_overrides(layer=1, max_new_tokens=NEW_TOKENS)
    backend, _ = open_model(str(folder), preset=preset, device="cpu", dtype="float32")
    oracle = InstructBlipOracle.of(folder)
    images = [picture(seed, backend.info.view) for seed in (1, 2)]
    question, _, places = conversation([], AGAIN)
    view = await backend.open_view(*images)
    first = await backend.first_pass(
        view, GenerationRequest(question, max_new_tokens=NEW_TOKENS, places=places)
    )
    compare_answer(first, oracle.answer_by_hand(question, *images, max_new_tokens=NEW_TOKENS))
    await backend.close()


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ([(0, 5, 0)], "after the end of its text"),
        ([(1, 0, 0)], "a question that does not exist"),
        ([(0, 2, 0), (0, 1, 1)], "reading order"),
        ([(0, 0, 1)], "a picture has no place"),
        ([(0, 0, n) for n in range(3)], "places of 3 pictures, but there are 2"),
        ([(0, 0, 0)] * 65, "at most 64"),
        ([(0, 0, 0)] * 30, "exceed"),
    ],
)
def test_impossible_places_are_refused(places, complaint, pairs) -> None:
    backend, _ = pairs["llava"]
    with pytest.raises(QuestionError, match=complaint):
        backend.check_question(
            GenerationRequest("what", places=tuple(Place(*each) for each in places)), 2
        )
