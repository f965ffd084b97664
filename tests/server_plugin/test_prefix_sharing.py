"""The prefix of a view is computed once, shared, never changed, and counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.models.presets import preset_named
from tests.support.oracle import picture
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from vlm_collab.geometry import Size

QUESTIONS = (
    "what is written on the large red sign?",
    "which number stands below the small blue door?",
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersBackend]:
    folder = save_tiny_llava(tmp_path_factory.mktemp("tiny"), TinyLlava(key_value_heads=2))
    backend = TransformersBackend.load(str(folder), preset_named("demo"), device="cpu")
    yield backend
    asyncio.run(backend.close())


async def test_forks_never_change_the_prefix(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    cache = view.prefixes[""].cache
    held = [layer.keys.clone() for layer in cache.layers]
    before = await backend.first_pass(
        view, GenerationRequest(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    )
    await backend.first_pass(view, GenerationRequest(QUESTIONS[1], max_new_tokens=NEW_TOKENS))
    await backend.relative_attention(view, before)
    await backend.second_pass(
        view, picture(1, Size(50, 50)), GenerationRequest(QUESTIONS[1], max_new_tokens=4)
    )
    after = await backend.first_pass(
        view, GenerationRequest(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    )
    assert replace(before, prefilled_tokens=0, row=None) == replace(
        after, prefilled_tokens=0, row=None
    )
    assert (before.row == after.row).all()
    for layer, keys in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.keys, keys)


@contextmanager
def counted_forwards(backend: TransformersBackend) -> Iterator[list[int]]:
    """Number of new positions in each forward of the decoder."""
    lengths: list[int] = []
    hook = backend._adapter.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


async def test_every_token_is_computed_once_and_reported_once(
    backend: TransformersBackend,
) -> None:
    visual = backend.info.visual_tokens
    with counted_forwards(backend) as lengths:
        view = await backend.open_view(picture(0, backend.info.view))
        prefix = lengths.pop()
        assert visual < prefix < visual + 10
        first = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=3))
        text = lengths[0]
        assert lengths == [text, 1, 1]
        assert first.prefilled_tokens == prefix + text == first.context_tokens
        lengths.clear()
        relative = await backend.relative_attention(view, first)
        assert lengths == [relative.prefilled_tokens]
        assert relative.context_tokens == prefix + relative.prefilled_tokens
        lengths.clear()
        again = await backend.relative_attention(view, first)
        assert lengths == []
        assert (again.prefilled_tokens, again.context_tokens) == (0, 0)
        assert (again.map == relative.map).all()
        follow_up = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
        assert lengths == [follow_up.prefilled_tokens] == [text]
        lengths.clear()
        second = await backend.second_pass(
            view, picture(1, Size(9, 9)), GenerationRequest("what?", max_new_tokens=1)
        )
        assert lengths == [second.prefilled_tokens] == [visual + text]
        assert second.context_tokens == prefix + visual + text


async def test_the_memory_of_a_view_is_what_it_holds(backend: TransformersBackend) -> None:
    view = await backend.open_view(picture(0, backend.info.view))
    tokens, width, key_heads, layers = view.prefixes[""].length, 16, 2, 4
    expected = tokens * width * key_heads * layers * 2 * 4  # keys and values, float32
    expected += backend.info.visual_tokens * 64 * 4  # what an interleaved question begins from
    assert view.nbytes <= backend.info.view_bytes
    assert view.nbytes == expected
    first = await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))
    assert view.nbytes == expected
    await backend.relative_attention(view, first)
    assert view.nbytes == expected + 4 * backend.info.visual_tokens
    await backend.release(view)
    await backend.release(view)
    assert view.nbytes == 0
    with pytest.raises(RuntimeError, match="released"):
        await backend.first_pass(view, GenerationRequest("what?", max_new_tokens=1))


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@contextmanager
def counted_flops(backend: TransformersBackend) -> Iterator[FlopCounterMode]:
    """Count what the model's own thread computes; PyTorch counts per thread."""
    # PyTorch's FLOP table has the fused kernels of CUDA, but not that of the CPU.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    backend._worker.call(counter.__enter__).result()
    yield counter
    backend._worker.call(lambda: counter.__exit__(None, None, None)).result()


async def test_a_retransmitted_question_costs_two_prefills(tmp_path: Path) -> None:
    """At most 2.10 x the FLOPs of one first-pass prefill, where the paper counts four (Eq. 19).

    576 visual tokens and, as in the 7B model, a width far above n / 6, so that attention is a
    small part of a layer; the answers are one token, so that nothing is decoded.
    """
    shape = TinyLlava(
        view_px=336, layers=2, heads=16, key_value_heads=16, hidden=1536, intermediate=4096,
        context_tokens=1536, vision_hidden=64,
    )  # fmt: skip
    preset = preset_named("demo").with_overrides(layer=0)
    folder = save_tiny_llava(tmp_path / "wide", shape)
    backend = TransformersBackend.load(str(folder), preset, device="cpu")
    assert backend.info.visual_tokens == 576
    with counted_flops(backend) as prefill:
        view = await backend.open_view(picture(0, backend.info.view))
        first = await backend.first_pass(view, GenerationRequest(QUESTIONS[0], max_new_tokens=1))
    with counted_flops(backend) as rest:
        await backend.relative_attention(view, first)
        region = picture(1, Size(300, 300))
        second = await backend.second_pass(
            view, region, GenerationRequest(QUESTIONS[0], max_new_tokens=1)
        )
    await backend.close()
    assert first.context_tokens > 576
    assert second.context_tokens > 2 * 576
    one, total = prefill.get_total_flops(), prefill.get_total_flops() + rest.get_total_flops()
    print(f"{total / one:.3f} x one prefill of {one / 1e9:.1f} GFLOP")
    # 24 n d^2 + 4 n^2 d a layer (Eq. 17), with an intermediate width of 8/3 d.
    assert one > 2 * 24 * 576 * 1536**2
    assert total <= 2.10 * one
