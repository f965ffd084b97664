"""Costs against plain counting and the printed numbers of Song and Kim, *Collaborative
Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_collab.geometry import Size
from vlm_collab.method.cost import (
    ByteCounter,
    additional_communication_cost,
    extension_flops,
    first_pass_flops,
    flops,
    larger_view_cost,
    relative_cost,
    second_stage_flops,
    shared_prefix_flops,
    total_flops,
)

LLAVA = {"d_llm": 4096, "layers": 32}
COUNTS = st.integers(0, 3000)


def test_byte_counter() -> None:
    counter = ByteCounter()
    counter.add("Ask", "up", 100)
    counter.add("Ask", "up", 50)
    counter.add("Region", "up", 7)
    counter.add("Answer", "down", 0)
    assert counter.total_bytes("up") == 157
    assert counter.total_bytes("up", "Ask") == 150
    assert counter.total_bytes("down") == 0
    assert counter.total_bytes("down", "Ask") == 0
    assert counter.total_messages("up") == 3
    assert counter.total_messages("down", "Answer") == 1
    assert counter.snapshot() == {"up": {"Ask": 150, "Region": 7}, "down": {"Answer": 0}}
    with pytest.raises(ValueError, match="bytes"):
        counter.add("Ask", "up", -1)


def test_additional_cost_is_one_if_all_are_sent_again_and_zero_if_none() -> None:
    view = 336 * 336
    assert additional_communication_cost([view] * 5, [view] * 5) == 1
    assert additional_communication_cost([0] * 5, [view] * 5) == 0
    assert additional_communication_cost([view, 0, 0, 0], [view] * 4) == 0.25
    # A region smaller than a view counts less; each sample has the same weight at any size.
    assert additional_communication_cost([50, 0], [100, 1000]) == 0.25


def test_llava_hd_costs_what_the_paper_says() -> None:
    assert round(larger_view_cost(Size(448, 448), Size(336, 336)), 2) == 0.78
    assert larger_view_cost(Size(336, 336), Size(336, 336)) == 0


def test_relative_cost_compares_totals() -> None:
    assert relative_cost([10, 30], [100, 60]) == 0.25
    assert relative_cost([0], [1]) == 0


@pytest.mark.parametrize(("mine", "theirs"), [([], []), ([1], [1, 2]), ([1], [0]), ([-1], [1])])
def test_impossible_samples_are_refused(mine: list[int], theirs: list[int]) -> None:
    with pytest.raises(ValueError):
        additional_communication_cost(mine, theirs)
    with pytest.raises(ValueError):
        relative_cost(mine, theirs)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError):
        larger_view_cost(Size(448, 448), Size(0, 336))
    with pytest.raises(ValueError):
        flops(-1, 4096, 32)


def test_equation_17_by_hand() -> None:
    # (24 · 576 · 4096² + 4 · 576² · 4096) · 32 for LLaVA-1.5-7B, about 7.6 teraflops.
    assert flops(576, **LLAVA) == (231_928_233_984 + 5_435_817_984) * 32 == 7_595_649_662_976


def test_equations_18_to_20() -> None:
    n = 576
    assert first_pass_flops(n, **LLAVA) == flops(n, **LLAVA)
    assert second_stage_flops(n, **LLAVA) == flops(n, **LLAVA) + flops(2 * n, **LLAVA)
    assert total_flops(n, **LLAVA, retransmitted=False) == flops(n, **LLAVA)
    everything = total_flops(n, **LLAVA, retransmitted=True)
    assert everything == 2 * flops(n, **LLAVA) + flops(2 * n, **LLAVA)
    assert 4.0 < everything / flops(n, **LLAVA) < 4.1


@given(COUNTS, COUNTS, COUNTS)
def test_extension_counts_each_new_row_once(cached: int, first: int, then: int) -> None:
    """Against a sum over single tokens; each attends to its whole block."""
    d, layers = 64, 3
    block = extension_flops(cached, first, d, layers)
    assert block == sum(24 * d * d + 4 * (cached + first) * d for _ in range(first)) * layers
    # In two steps the first part does not attend to the second, so it never costs more.
    steps = block + extension_flops(cached + first, then, d, layers)
    assert steps <= extension_flops(cached, first + then, d, layers)
    assert extension_flops(0, first, d, layers) == flops(first, d, layers)


def test_shared_prefix_halves_the_papers_count() -> None:
    n = 576
    once = flops(n, **LLAVA)
    shared = shared_prefix_flops(n, n, **LLAVA, question=29, generic=30)
    assert 2.0 < shared / once < 2.25
    assert shared < 0.56 * total_flops(n, **LLAVA, retransmitted=True)
    sure = shared_prefix_flops(n, n, **LLAVA, question=29, retransmitted=False)
    assert sure == flops(n + 29, **LLAVA)
