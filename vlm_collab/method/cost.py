"""Costs of an answer: bytes on the wire, pixels sent again, floating-point operations.

Sources: Eq. 17-20 and sections V-B, VII-A, VII-B and VII-F of Song and Kim, *Collaborative
Edge-to-Server Inference for Vision-Language Models* (2025, arXiv 2512.16349). Standard library
only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from vlm_collab.geometry import Size

Direction: TypeAlias = Literal["up", "down"]
"""Edge to server, or server to edge."""


class ByteCounter:
    """Bytes sent and received on one side, counted per kind of message and direction.

    A kind is the name of a message class. Count only messages that were decoded, so that a peer
    cannot make up keys.
    """

    __slots__ = ("_bytes", "_messages")

    def __init__(self) -> None:
        self._bytes: Counter[tuple[Direction, str]] = Counter()
        self._messages: Counter[tuple[Direction, str]] = Counter()

    def add(self, kind: str, direction: Direction, size_bytes: int) -> None:
        """Count one message of `size_bytes`, framing included where that is known.

        Raises:
            ValueError: the size is negative.
        """
        if size_bytes < 0:
            raise ValueError(f"a message cannot have {size_bytes} bytes")
        self._bytes[direction, kind] += size_bytes
        self._messages[direction, kind] += 1

    def total_bytes(self, direction: Direction, kind: str | None = None) -> int:
        """Bytes of one kind, or of all kinds together, in one direction."""
        return _total(self._bytes, direction, kind)

    def total_messages(self, direction: Direction, kind: str | None = None) -> int:
        """Messages of one kind, or of all kinds together, in one direction."""
        return _total(self._messages, direction, kind)

    def snapshot(self) -> dict[Direction, dict[str, int]]:
        """Bytes as `{"up": {kind: bytes}, "down": {kind: bytes}}`, kinds sorted by name."""
        counts: dict[Direction, dict[str, int]] = {"up": {}, "down": {}}
        for (direction, kind), size_bytes in sorted(self._bytes.items()):
            counts[direction][kind] = size_bytes
        return counts


def _total(counts: Counter[tuple[Direction, str]], direction: Direction, kind: str | None) -> int:
    return sum(
        count
        for (way, name), count in counts.items()
        if way == direction and (kind is None or name == kind)
    )


def additional_communication_cost(
    local_pixels: Sequence[int], global_pixels: Sequence[int]
) -> float:
    """Additional communication cost (Song and Kim, section VII-A).

    The pixels of a sample's local view over those of its global view, averaged over all samples.
    It is 1 if every sample was retransmitted at the global view's size, and 0 if none was.

    Args:
        local_pixels: pixels of the local view sent for each sample, 0 if none was sent.
        global_pixels: pixels of the global view of each sample, in the same order.

    Raises:
        ValueError: no samples, lengths that differ, or impossible pixel counts.
    """
    if not local_pixels or len(local_pixels) != len(global_pixels):
        raise ValueError(f"{len(local_pixels)} local views, but {len(global_pixels)} global views")
    if min(global_pixels) < 1 or min(local_pixels) < 0:
        raise ValueError("a global view must have pixels; a local view cannot have fewer than 0")
    shares = (local / whole for local, whole in zip(local_pixels, global_pixels, strict=True))
    return sum(shares) / len(local_pixels)


def larger_view_cost(view: Size, baseline: Size) -> float:
    """Additional communication cost of sending every image once, at a larger size.

    view pixels / baseline pixels − 1. Song and Kim place LLaVA-1.5-HD on their cost axis in this
    way: 448² against 336² pixels is 0.78 (section VII-B).

    Raises:
        ValueError: the baseline has no pixels.
    """
    if baseline.width < 1 or baseline.height < 1:
        raise ValueError(f"impossible baseline view {baseline.width} x {baseline.height}")
    return view.width * view.height / (baseline.width * baseline.height) - 1


def relative_cost(sent_bytes: Sequence[int], global_jpeg100_bytes: Sequence[int]) -> float:
    """Relative communication cost (Song and Kim, section VII-F).

    The image bytes sent for all samples, over the bytes of their global views as JPEG of quality
    100. It is a ratio of two totals, since it compares volumes of data.

    Args:
        sent_bytes: for each sample, the bytes of all pictures sent: views and regions.
        global_jpeg100_bytes: for each sample, the bytes of its global view as JPEG quality 100.

    Raises:
        ValueError: no samples, lengths that differ, or a reference without bytes.
    """
    if not sent_bytes or len(sent_bytes) != len(global_jpeg100_bytes):
        raise ValueError(f"{len(sent_bytes)} samples, but {len(global_jpeg100_bytes)} references")
    if min(global_jpeg100_bytes) < 1 or min(sent_bytes) < 0:
        raise ValueError("a reference must have bytes, and a sample cannot have fewer than 0")
    return sum(sent_bytes) / sum(global_jpeg100_bytes)


def flops(n_v: int, d_llm: int, layers: int) -> int:
    """FLOPs to prefill `n_v` visual tokens: F(n) = (24·n·d² + 4·n²·d)·L (Song and Kim, Eq. 17).

    Args:
        n_v: number of visual tokens n. Text tokens, a few per cent, are neglected.
        d_llm: hidden size d of the language model.
        layers: its number of decoder layers L.

    Raises:
        ValueError: a negative argument.
    """
    return extension_flops(0, n_v, d_llm, layers)


def first_pass_flops(n_v: int, d_llm: int, layers: int) -> int:
    """FLOPs of the first pass: F(n) (Song and Kim, Eq. 18)."""
    return flops(n_v, d_llm, layers)


def second_stage_flops(n_v: int, d_llm: int, layers: int) -> int:
    """FLOPs of the second stage: F(n) + F(2n) (Song and Kim, Eq. 19).

    F(n) prefills the global view under the generic instruction; F(2n) is the second pass over
    both views.
    """
    return flops(n_v, d_llm, layers) + flops(2 * n_v, d_llm, layers)


def total_flops(n_v: int, d_llm: int, layers: int, *, retransmitted: bool) -> int:
    """FLOPs of one sample (Song and Kim, Eq. 20).

    F(n), plus F(n) + F(2n) if it was retransmitted.
    """
    first = first_pass_flops(n_v, d_llm, layers)
    return first + second_stage_flops(n_v, d_llm, layers) if retransmitted else first


def extension_flops(cached: int, added: int, d_llm: int, layers: int) -> int:
    """FLOPs to append tokens to a sequence of cached keys and values.

    (24·k·d² + 4·k·(m + k)·d)·L for k added tokens after m cached ones: Song and Kim, Eq. 17, for
    the new tokens only. With m = 0 it equals Eq. 17. Like Eq. 17, it does not halve attention for
    the causal mask. The papers do not give this formula.

    Args:
        cached: number of cached tokens m.
        added: number of added tokens k.
        d_llm: hidden size d of the language model.
        layers: its number of decoder layers L.

    Raises:
        ValueError: a negative argument.
    """
    if min(cached, added, d_llm, layers) < 0:
        raise ValueError("counts of tokens, hidden size and layers cannot be negative")
    return (24 * added * d_llm**2 + 4 * added * (cached + added) * d_llm) * layers


def shared_prefix_flops(
    n_v: int,
    n_local: int,
    d_llm: int,
    layers: int,
    *,
    question: int = 0,
    generic: int = 0,
    retransmitted: bool = True,
) -> int:
    """FLOPs that this project's engine spends on one sample, by `extension_flops`.

    Every prompt begins with the global view's visual tokens. The engine computes their keys and
    values once, and all three prefills continue from them: the first pass adds the question, the
    generic instruction adds its own tokens, and the second pass adds the local view and the
    question. With as many local as global tokens this is about 2·F(n); Song and Kim, Eq. 18-20,
    count 4·F(n). The papers do not give this formula.

    Args:
        n_v: visual tokens of the global view.
        n_local: visual tokens of the local view.
        d_llm: hidden size of the language model.
        layers: its number of decoder layers.
        question: tokens of the prompt after the views.
        generic: tokens of the generic instruction's prompt after the view.
        retransmitted: whether the second stage took place.

    Raises:
        ValueError: a negative argument.
    """
    first = extension_flops(0, n_v + question, d_llm, layers)
    if not retransmitted:
        return first
    relative = extension_flops(n_v, generic, d_llm, layers)
    return first + relative + extension_flops(n_v, n_local + question, d_llm, layers)
