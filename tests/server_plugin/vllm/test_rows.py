"""Computations of the vLLM plugin, without vLLM: keys from cache layouts, rows, ranks, steps."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.capture import (
    FIRST,
    KEY,
    MAX_ROWS,
    MAX_ROWS_BYTES,
    STOP,
    RowReader,
)
from server_plugin.backends.vllm.rows import (
    mean_over_ranks,
    summed_row,
    token_major_keys,
    vector_keys,
)

HEADS, KV_HEADS, WIDTH, BLOCK, BLOCKS = 8, 4, 32, 16, 12
CONTEXT = 83
TABLE = torch.tensor([7, 2, 11, 0, 5, 9])


@pytest.fixture
def keys() -> torch.Tensor:
    """(key/value heads, context, width)"""
    return torch.randn(KV_HEADS, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(0))


def put(keys: torch.Tensor, key_at: Any) -> None:
    for position in range(keys.shape[1]):
        block, offset = TABLE[position // BLOCK], position % BLOCK
        for head in range(keys.shape[0]):
            key_at(block, head, offset)[...] = keys[head, position]


def in_order(blocks: torch.Tensor) -> torch.Tensor:
    """(key/value heads, context, width) from (blocks, key/value heads, width, block)."""
    return blocks.permute(1, 0, 3, 2).flatten(1, 2)[:, :CONTEXT]


def in_blocks(keys: torch.Tensor) -> torch.Tensor:
    """The inverse; the rest of the last block holds another request's values."""
    tail = torch.full((len(keys), -keys.shape[1] % BLOCK, WIDTH), 9.0)
    blocks = torch.cat([keys, tail], 1).unflatten(1, (-1, BLOCK))
    return blocks.permute(1, 0, 3, 2)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_token_major_keys_are_found_in_any_physical_order(
    axes: tuple[int, ...], keys: torch.Tensor
) -> None:
    sizes = (BLOCKS, KV_HEADS, BLOCK, 2 * WIDTH)
    memory = torch.full([sizes[axis] for axis in axes], torch.nan)
    cache = memory.permute(*(axes.index(axis) for axis in range(4)))
    assert cache.shape == sizes
    put(keys, lambda block, head, offset: cache[block, head, offset, :WIDTH])
    assert torch.equal(in_order(token_major_keys(cache, TABLE)), keys)


def test_vector_keys_lie_column_major_before_all_values(keys: torch.Tensor) -> None:
    cache = torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * WIDTH), torch.nan)
    flat = cache.view(BLOCKS, KV_HEADS, 2 * BLOCK * WIDTH)
    put(keys, lambda block, head, offset: flat[block, head, offset : BLOCK * WIDTH : BLOCK])
    assert torch.equal(in_order(vector_keys(cache, TABLE)), keys)


def weights(query: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Attention of each head over the context, from the definition."""
    rows = []
    for head in range(len(query)):
        scores = keys[head * len(keys) // len(query)].double() @ query[head].double()
        rows.append(torch.softmax(scores * 0.3, 0).numpy())
    return np.array(rows)


@pytest.fixture
def query() -> torch.Tensor:
    return torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_row_is_softmax_attention_over_the_whole_context(
    query: torch.Tensor, keys: torch.Tensor
) -> None:
    row = summed_row(query, in_blocks(keys), CONTEXT, 0.3, 5, 69)
    np.testing.assert_allclose(row, weights(query, keys).sum(0)[5:69], rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_add_up_to_the_mean_over_all_heads(
    ranks: int, query: torch.Tensor, keys: torch.Tensor
) -> None:
    parts: list[tuple[bytes, int] | None] = [None]  # a pipeline stage without the layer
    for rank in range(ranks):
        heads = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
        # With more ranks than key/value heads, vLLM keeps a head's keys on several ranks.
        first = rank * KV_HEADS // ranks
        own = keys[first : max((rank + 1) * KV_HEADS // ranks, first + 1)]
        row = summed_row(query[heads], in_blocks(own), CONTEXT, 0.3, 5, 69)
        parts.append((row.numpy().tobytes(), HEADS // ranks))
    mean = mean_over_ranks(parts, HEADS)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, weights(query, keys).mean(0)[5:69], rtol=1e-5)
    with pytest.raises(ValueError, match="heads"):
        mean_over_ranks(parts[:-1], HEADS)
    with pytest.raises(ValueError, match="heads"):
        mean_over_ranks([*parts, parts[-1]], HEADS)


def new(name: str, prompt: int, computed: int = 0, **extra: Any) -> SimpleNamespace:
    """A new request as the scheduler describes it."""
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=list(range(prompt)),
        num_computed_tokens=computed,
        sampling_params=SimpleNamespace(extra_args=extra or None),
    )


def step(
    new: list[Any], going_on: dict[str, int], lengths: dict[str, int], finished: set[str]
) -> SimpleNamespace:
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(going_on), num_computed_tokens=list(going_on.values())
        ),
        num_scheduled_tokens=lengths,
        finished_req_ids=finished,
    )


def asking(first: Any = 3, stop: Any = 40, key: Any = "row") -> dict[str, Any]:
    return {KEY: key, FIRST: first, STOP: stop}


@pytest.fixture
def reader() -> RowReader:
    return RowReader(list, token_major_keys, lambda metadata: TABLE[None], HEADS, {"row"})


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_ends_in_exactly_one_step_however_it_is_chunked(
    seed: int, reader: RowReader
) -> None:
    draw = random.Random(seed)
    prompt, computed = draw.randint(41, 200), draw.choice((0, 16, 40))
    due, first = [], True
    while computed < prompt + 5:
        length = min(draw.randint(1, 30), prompt - computed) if computed < prompt else 1
        newcomers = [new("a", prompt, computed, **asking())] if first else []
        reader.step(step(newcomers, {} if first else {"a": computed}, {"a": length, "b": 1}, set()))
        first = False
        if reader.due:
            due.append(computed + reader.due["a"])
            reader.pending.pop("a")  # as `read` does
        computed += length
    assert due == [prompt - 1]


def test_a_preempted_prompt_is_due_when_it_ends(reader: RowReader) -> None:
    reader.step(step([new("a", 60, **asking())], {}, {"a": 40}, set()))
    assert not reader.due
    reader.step(step([], {}, {"b": 1}, set()))
    reader.step(step([], {"a": 0}, {"a": 30}, set()))
    assert not reader.due
    reader.step(step([], {"a": 30}, {"a": 30}, set()))
    assert reader.due == {"a": 29}


def test_a_finished_request_is_forgotten(reader: RowReader) -> None:
    reader.step(step([new("a", 60, **asking())], {}, {"a": 40}, set()))
    reader.step(step([], {}, {}, {"a"}))
    assert not reader.pending


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"other": 1},
        asking(key=7),
        asking(key="row" + "long" * 20),
        # Other users of the engine can choose any key, and could displace our rows.
        asking(key="another's"),
        asking(key=""),
        asking(first="3"),
        asking(stop=None),
        asking(first=-1),
        asking(first=40, stop=40),
        asking(stop=61),
        {KEY: "row", FIRST: 3},
    ],
)
def test_malformed_row_requests_are_ignored(extra: dict[str, Any], reader: RowReader) -> None:
    reader.step(step([new("a", 60, **extra)], {}, {"a": 60}, set()))
    assert not reader.pending
    assert not reader.due


def test_several_requests_in_one_step_get_their_own_rows(
    query: torch.Tensor, keys: torch.Tensor
) -> None:
    # The prompts of "b" and "d" end here, those of the others do not.
    order = ["a", "b", "c", "d"]
    lengths = {"a": 1, "b": 3, "c": 2, "d": 1}
    prompts = {"b": CONTEXT, "d": 50}
    cache = torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * WIDTH), torch.nan)
    put(keys, lambda block, head, offset: cache[block, head, offset, :WIDTH])
    tables = TABLE.repeat(4, 1)
    reader = RowReader(lambda: order, token_major_keys, lambda metadata: tables, HEADS, {"row"})
    reader.step(
        step(
            [
                new("b", CONTEXT, CONTEXT - 3, **asking(3, 40, "row b")),
                new("d", 50, 49, **asking(0, 9, "row d")),
            ],
            {"a": 90, "c": 10},
            lengths,
            set(),
        )
    )
    queries = torch.zeros(7, HEADS * WIDTH)
    queries[3], queries[6] = query.flatten(), 2 * query.flatten()
    layer = SimpleNamespace(impl=SimpleNamespace(num_heads=HEADS, head_size=WIDTH, scale=0.3))
    reader.read(layer, queries, cache, None)
    assert not reader.pending
    expected = {
        "row b": weights(query, keys).sum(0)[3:40],
        "row d": weights(2 * query, keys[:, : prompts["d"]]).sum(0)[:9],
    }
    for key, wanted in expected.items():
        (part,) = reader.take([key])
        assert part is not None
        assert part[1] == HEADS
        np.testing.assert_allclose(np.frombuffer(part[0], np.float32), wanted, rtol=1e-5)
    assert reader.take(["row b", "row d"]) == [None, None], "a row can be taken once"


def test_rows_that_nobody_fetches_do_not_pile_up(reader: RowReader) -> None:
    for number in range(MAX_ROWS + 5):
        reader._keep(str(number), torch.zeros(2))
    assert len(reader.rows) == MAX_ROWS
    oldest, newest = reader.take(["4", str(MAX_ROWS + 4)])
    assert oldest is None
    assert newest is not None


def test_long_rows_that_nobody_fetches_do_not_fill_the_device(reader: RowReader) -> None:
    entries = MAX_ROWS_BYTES // 16
    for number in range(9):
        reader._keep(str(number % 8), torch.zeros(entries))
    assert sorted(reader.rows) == ["0", "5", "6", "7"]
    assert reader.rows_bytes == MAX_ROWS_BYTES
    assert reader.take(["0", "0"])[1] is None
    assert reader.rows_bytes == MAX_ROWS_BYTES * 3 // 4


def engine_of(**changes: Any) -> SimpleNamespace:
    """An engine's configuration as far as it is checked: plain values with some changes."""
    parallel = {"use_ubatching": False} | changes
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=None,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"use_ubatching": True},
        {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": 2},
    ],
)
def test_steps_that_are_divided_in_other_ways_are_refused(change: dict[str, Any]) -> None:
    capture._check(engine_of())
    with pytest.raises(capture.UnsupportedError):
        capture._check(engine_of(**change))


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_full_graphs_are_refused(mode: str) -> None:
    engine = engine_of()
    engine.compilation_config.cudagraph_mode = SimpleNamespace(name="PIECEWISE")
    capture._check(engine)
    engine.compilation_config.cudagraph_mode = SimpleNamespace(name=mode)
    with pytest.raises(capture.UnsupportedError, match=mode):
        capture._check(engine)


def test_flashinfer_s_block_table_is_the_runner_s() -> None:
    backend = SimpleNamespace(get_name=lambda: "FLASHINFER")
    layer = SimpleNamespace(attn_backend=backend, layer_name="mine")
    groups = [SimpleNamespace(layer_names=["other"]), SimpleNamespace(layer_names=["mine"])]
    tables = [
        SimpleNamespace(get_device_tensor=lambda count: None),
        SimpleNamespace(get_device_tensor=lambda count: TABLE.repeat(9, 1)[:count]),
    ]
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(use_v2_model_runner=False),
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        input_batch=SimpleNamespace(block_table=tables, num_reqs=2),
    )
    assert torch.equal(capture._block_table(layer, runner)(None), TABLE.repeat(2, 1))
    runner.vllm_config.use_v2_model_runner = True
    with pytest.raises(capture.UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        capture._block_table(layer, runner)


def test_attention_that_would_give_other_weights_is_refused() -> None:
    plain = {"kv_cache_dtype": "auto", "sliding_window": None, "alibi_slopes": None}
    capture._check_layer(SimpleNamespace(**plain))
    for change in (
        {"kv_cache_dtype": "fp8"},
        {"sliding_window": 128},
        {"sliding_window": (127, 0)},
        {"logits_soft_cap": 30.0},
        {"alibi_slopes": torch.ones(2)},
        {"sinks": torch.ones(2)},
    ):
        with pytest.raises(capture.UnsupportedError):
            capture._check_layer(SimpleNamespace(**{**plain, **change}))
