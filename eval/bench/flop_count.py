"""Count executed floating-point operations with PyTorch's own counter.

It counts matrix products, convolutions and attention, with two operations for each multiply-add and
without halving attention for the causal mask, as in Song and Kim, *Collaborative Edge-to-Server
Inference for Vision-Language Models* (2025, arXiv 2512.16349), Eq. 17. Neither counts norms,
activations, softmax and sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from server_plugin.backends.transformers.backend import TransformersBackend


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def flop_counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, extended from CUDA's fused kernels to the CPU's."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


@contextmanager
def counted(backend: TransformersBackend) -> Iterator[FlopCounterMode]:
    """Count a backend's FLOPs in its own thread, because PyTorch counts per thread."""
    counter = flop_counter()
    backend._worker.call(counter.__enter__).result()
    try:
        yield counter
    finally:
        backend._worker.call(
            lambda: counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        ).result()
