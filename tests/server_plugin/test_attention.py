"""The attention row beside fused attention, against the full matrix computed plainly."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from server_plugin.backends.transformers.attention import (
    ATTENTION_NAME,
    RowCapture,
    RowReadyError,
    capturing_attention,
    last_query_rows,
    use_capturing_attention,
)

HEADS, QUERIES, CONTEXT, WIDTH = 6, 5, 40, 16


class Layer(torch.nn.Module):
    """The parts of an attention layer that an attention function uses."""

    def __init__(self, layer_idx: int, groups: int = 1) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_key_value_groups = groups
        self.is_causal = True


def random_tensors(
    key_heads: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, WIDTH, generator=random).to(dtype)

    return draw(HEADS, QUERIES), draw(key_heads, CONTEXT), draw(key_heads, CONTEXT)


def plain_row(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """The last row of the whole matrix, one head after the other, in float64."""
    rows = []
    share = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        scores = query[0, head].double() @ key[0, head // share].double().T * scaling
        rows.append(torch.softmax(scores, dim=-1)[-1])
    return torch.stack(rows).mean(dim=0)


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_row_equals_the_last_row_of_the_full_matrix(key_heads: int, scaling: float | None) -> None:
    query, key, _ = random_tensors(key_heads, seed=key_heads)
    (row,) = last_query_rows(query, key, scaling)
    assert row.shape == (CONTEXT,)
    assert row.dtype == torch.float32
    expected = plain_row(query, key, WIDTH**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-9)
    assert row.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_row_of_half_precision_is_computed_in_single_precision() -> None:
    query, key, _ = random_tensors(3, torch.bfloat16)
    (row,) = last_query_rows(query, key)
    assert row.dtype == torch.float32
    torch.testing.assert_close(
        row.double(), plain_row(query, key, WIDTH**-0.5), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
def test_rows_of_a_padded_batch_equal_those_of_each_sequence_alone(key_heads: int) -> None:
    """Padding between a prefix of 7 positions and the rest gets no attention."""
    pads = (0, 3, 11)
    query, keys = torch.empty(3, HEADS, 1, WIDTH), torch.empty(3, key_heads, CONTEXT, WIDTH)
    visible = torch.ones(3, CONTEXT, dtype=torch.bool)
    expected = torch.zeros(3, CONTEXT, dtype=torch.double)
    for number, pad in enumerate(pads):
        drawn, key, _ = random_tensors(key_heads, seed=number)
        query[number], keys[number] = drawn[0, :, -1:], key[0]
        visible[number, 7 : 7 + pad] = False
        alone = key[:, :, visible[number]]
        expected[number, visible[number]] = plain_row(drawn, alone, WIDTH**-0.5)
    rows = last_query_rows(query, keys, visible=visible)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-9)
    assert (rows[~visible] == 0).all()


def test_only_the_requested_layer_is_captured_and_the_output_is_unchanged() -> None:
    query, key, value = random_tensors(6)
    capture = RowCapture(layer=3, keys=[slice(4, 20)])
    for layer_idx in (2, 3, 4):
        layer = Layer(layer_idx)
        stock, _ = sdpa_attention_forward(layer, query, key, value, None, scaling=0.3)
        got, weights = capturing_attention(
            layer, query, key, value, None, scaling=0.3, row_capture=capture
        )
        assert torch.equal(got, stock)
        assert weights is None
        query, key, value = random_tensors(6, seed=layer_idx)
    # Layer 3 saw the tensors drawn after layer 2.
    query, key, _ = random_tensors(6, seed=2)
    torch.testing.assert_close(capture.take()[0].double(), plain_row(query, key, 0.3)[4:20])


def test_a_row_that_was_not_captured_is_an_error() -> None:
    capture = RowCapture(layer=9, keys=[slice(0, 1)])
    query, key, value = random_tensors(6)
    capturing_attention(Layer(0), query, key, value, None, row_capture=capture)
    with pytest.raises(RuntimeError, match=r"layer 9 \(transformers "):
        capture.take()


def test_stop_ends_the_forward_at_its_layer() -> None:
    decoder, ran = LlamaModel(tiny_config()).eval(), []
    use_capturing_attention(decoder)
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(lambda *_, i=layer.self_attn.layer_idx: ran.append(i))
    embeddings = torch.randn(1, 12, 32)
    with torch.inference_mode():
        whole = RowCapture(layer=1, keys=[slice(0, 12)])
        decoder(inputs_embeds=embeddings, row_capture=whole)
        assert ran == [0, 1, 2]
        ran.clear()
        stopped = RowCapture(layer=1, keys=[slice(0, 12)], stop=True)
        with pytest.raises(RowReadyError):
            decoder(inputs_embeds=embeddings, row_capture=stopped)
    assert ran == [0]
    assert (whole.take() == stopped.take()).all()


def test_the_full_matrix_is_never_computed() -> None:
    # 2 FLOPs per product: one query per head times every key, however many queries there are.
    query, key, value = random_tensors(3)
    capture = RowCapture(layer=0, keys=[slice(0, CONTEXT)])
    counts = []
    for row_capture in (None, capture):
        with FlopCounterMode(display=False) as counter:
            capturing_attention(
                Layer(0, groups=2), query, key, value, None, row_capture=row_capture
            )
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * HEADS * CONTEXT * WIDTH


def test_other_models_keep_their_attention() -> None:
    ours, other = LlamaModel(tiny_config()), LlamaModel(tiny_config())
    use_capturing_attention(ours)
    use_capturing_attention(ours)
    assert ours.config._attn_implementation == ATTENTION_NAME
    assert other.config._attn_implementation == "sdpa"


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
