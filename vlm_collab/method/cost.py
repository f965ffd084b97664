"""What an answer costs: bytes on the wire, pixels sent again, floating-point operations.

Sources: section V-B, Eq. 17-20, and sections VII-A, VII-B and VII-F of
`003_92b41fe49395ce1a.txt`. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from vlm_collab.geometry import Size

Direction: TypeAlias = Literal["up", "down"]
"""Edge to server, or server to edge."""


class ByteCounter:
    """Bytes really sent and received on one side, per kind of message and direction.

    A kind is the name of a message class. Only messages that were understood belong here: a
    peer must not be able to make up keys.
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
    """Section VII-A of 003: pixels of local views over pixels of global views, the mean over all
    samples. 1 if every sample was retransmitted at the global view's size, 0 if none was.

    Args:
        local_pixels: pixels of the local view sent for each sample, 0 where none was.
        global_pixels: pixels of the global view of each sample, in the same order.

    Raises:
        ValueError: no samples, lengths that differ, or impossible pixel counts.
    """
    if not local_pixels or len(local_pixels) != len(global_pixels):
        raise ValueError(f"{len(local_pixels)} local views for {len(global_pixels)} global views")
    if min(global_pixels) < 1 or min(local_pixels) < 0:
        raise ValueError("a global view has at least one pixel, a local view none or more")
    shares = (mine / theirs for mine, theirs in zip(local_pixels, global_pixels, strict=True))
    return sum(shares) / len(local_pixels)


def larger_view_cost(view: Size, baseline: Size) -> float:
    """Additional communication cost of sending every image once, at a larger size.

    How 003 places LLaVA-1.5-HD on its axis: 448² against 336² pixels is 0.78 (section VII-B).

    Raises:
        ValueError: the baseline has no pixels.
    """
    if baseline.width < 1 or baseline.height < 1:
        raise ValueError(f"impossible baseline view {baseline.width} x {baseline.height}")
    return view.width * view.height / (baseline.width * baseline.height) - 1


def relative_cost(sent_bytes: Sequence[int], global_jpeg100_bytes: Sequence[int]) -> float:
    """Section VII-F of 003: image bytes sent over the bytes of the same samples' global views as
    JPEG of quality 100. A ratio of totals, since it compares volumes of data.

    Args:
        sent_bytes: for each sample, the bytes of all the pictures sent, views and regions.
        global_jpeg100_bytes: for each sample, the bytes of its global view as JPEG quality 100.

    Raises:
        ValueError: no samples, lengths that differ, or a reference without bytes.
    """
    if not sent_bytes or len(sent_bytes) != len(global_jpeg100_bytes):
        raise ValueError(f"{len(sent_bytes)} samples for {len(global_jpeg100_bytes)} references")
    if min(global_jpeg100_bytes) < 1 or min(sent_bytes) < 0:
        raise ValueError("a reference has at least one byte, a sample none or more")
    return sum(sent_bytes) / sum(global_jpeg100_bytes)


def flops(n_v: int, d_llm: int, layers: int) -> int:
    """Eq. 17 of 003: operations to prefill `n_v` visual tokens, (24·n·d² + 4·n²·d)·L.

    Args:
        n_v: visual tokens; the text's few per cent are neglected.
        d_llm: hidden size of the language model.
        layers: its number of decoder layers.

    Raises:
        ValueError: a negative argument.
    """
    return extension_flops(0, n_v, d_llm, layers)


def first_pass_flops(n_v: int, d_llm: int, layers: int) -> int:
    """Eq. 18 of 003: F(n)."""
    return flops(n_v, d_llm, layers)


def second_stage_flops(n_v: int, d_llm: int, layers: int) -> int:
    """Eq. 19 of 003: F(n) to prefill once more under the generic instruction, F(2n) for the
    second pass over both views."""
    return flops(n_v, d_llm, layers) + flops(2 * n_v, d_llm, layers)


def total_flops(n_v: int, d_llm: int, layers: int, *, retransmitted: bool) -> int:
    """Eq. 20 of 003, for one sample."""
    first = first_pass_flops(n_v, d_llm, layers)
    return first + second_stage_flops(n_v, d_llm, layers) if retransmitted else first


def extension_flops(cached: int, added: int, d_llm: int, layers: int) -> int:
    """Operations to append tokens to a sequence whose keys and values are cached.

    Not of the papers: Eq. 17 of 003 with the rows of the new tokens only,
    (24·k·d² + 4·k·(m + k)·d)·L for k tokens after m. Like Eq. 17, it does not halve attention
    for the causal mask; with m = 0 it *is* Eq. 17.

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
    """Operations as this project's engine spends them, by `extension_flops`.

    Not of the papers: the global view's visual tokens open every prompt, so their keys and
    values are computed once and the three prefills fork from them. First pass: n_v and the
    question. Generic instruction: its own tokens. Second pass: the local view and the question.
    With as many local tokens as global ones this is about 2·F(n), where Eq. 18-20 of 003 count
    4·F(n).

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
