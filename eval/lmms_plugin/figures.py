"""Cost figures of a run for lmms-eval's metrics hook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from eval.lmms_plugin.runner import CostedAnswer
from vlm_collab.protocol.messages import Fallback, Finish, Stage


@dataclass(slots=True)
class Totals:
    """Sums over questions, which can be added over processes.

    Attributes:
        questions, failed: all questions; those without an answer.
        second, fallback, cut: answers of the second pass; first answers used because the second
            pass failed or was declined; answers that reached the length limit.
        bytes_up, bytes_down, view_bytes, region_bytes, original_bytes, decoded_tokens, mflops:
            as in `CostedAnswer`.
        additional: region pixels over view pixels.
        own_files: questions whose originals have the sizes of their stored files.
        uncertainty: uncertainty of the first answers.
    """

    questions: int = 0
    failed: int = 0
    second: int = 0
    fallback: int = 0
    cut: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    view_bytes: int = 0
    region_bytes: int = 0
    original_bytes: int = 0
    decoded_tokens: int = 0
    mflops: int = 0
    additional: float = 0.0
    own_files: int = 0
    uncertainty: float = 0.0

    def figures(self) -> dict[str, float]:
        """The reported figures: means over the answered questions."""
        answered = max(self.questions - self.failed, 1)
        figures: dict[str, float] = {
            "total_requests": self.questions,
            "failed_rate": self.failed / max(self.questions, 1),
            "retransmission_rate": self.second / answered,
            "fallback_rate": self.fallback / answered,
            "cut_rate": self.cut / answered,
            "additional_cost": self.additional / answered,
            "bytes_up": self.bytes_up / answered,
            "bytes_down": self.bytes_down / answered,
            "view_bytes": self.view_bytes / answered,
            "region_bytes": self.region_bytes / answered,
            "original_bytes": self.original_bytes / answered,
            "own_file_rate": self.own_files / answered,
            "mflops": self.mflops / answered,
            "first_uncertainty": self.uncertainty / answered,
        }
        if self.original_bytes:
            figures["bytes_up_of_original"] = self.bytes_up / self.original_bytes
        return figures


def totals_of(replies: Iterable[CostedAnswer | Exception]) -> Totals:
    """Sum up the replies of one process."""
    totals = Totals()
    for reply in replies:
        totals.questions += 1
        if isinstance(reply, Exception):
            totals.failed += 1
            continue
        totals.second += reply.stage is Stage.SECOND
        totals.fallback += reply.fallback is not Fallback.NONE
        totals.cut += reply.finish is Finish.LENGTH
        totals.bytes_up += reply.bytes_up
        totals.bytes_down += reply.bytes_down
        totals.view_bytes += reply.view_bytes
        totals.region_bytes += reply.region_bytes
        totals.original_bytes += reply.original_bytes
        totals.decoded_tokens += reply.decoded_tokens
        totals.mflops += reply.mflops
        totals.additional += reply.region_pixels / reply.view_pixels
        totals.own_files += reply.own_files
        totals.uncertainty += reply.first_uncertainty
    return totals


_OF_EACH_TASK = (
    "retransmission_rate", "bytes_up", "bytes_up_of_original", "additional_cost", "cut_rate",
    "failed_rate",
)  # fmt: skip


def all_figures(tasks: Mapping[str, Totals]) -> dict[str, float]:
    """Figures of all tasks together; with several tasks, also main ones as `task/figure`."""
    figures = sum_totals(list(tasks.values())).figures()
    if len(tasks) > 1:
        for task, totals in tasks.items():
            own = totals.figures()
            figures |= {f"{task}/{name}": own[name] for name in _OF_EACH_TASK if name in own}
    return figures


def sum_totals(parts: Sequence[Totals]) -> Totals:
    """Add up sums."""
    names = [field.name for field in fields(Totals)]
    return Totals(**{name: sum(getattr(part, name) for part in parts) for name in names})
