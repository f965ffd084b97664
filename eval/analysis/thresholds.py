"""Choice of a threshold on a run: for a rate, a budget of bytes, or a bound on the loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from eval.analysis.curves import (
    Bootstrap,
    Criterion,
    Curve,
    curve,
    end_points,
    includes_end_token,
    uncertainty,
)
from eval.analysis.guarantee import GuaranteedThreshold, guaranteed
from eval.analysis.operating_points import column, sends_region
from eval.analysis.run import Run
from eval.analysis.splits import reported_note
from server_plugin.models.calibration import Calibration
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric


def setting_of(run: Run, metric: str | None, aggregate: str | None, k: int | None) -> Criterion:
    """The user's criterion, completed from the run's preset.

    Raises:
        ConfigError: unknown metric or aggregation, or `k` without `first_k`.
    """
    preset = run.provenance["model"].get("preset") or {}
    try:
        chosen = Metric(metric or preset.get("metric", Metric.MIN_ENTROPY))
        how = Aggregate(aggregate or preset.get("aggregate", Aggregate.FULL))
    except ValueError as error:
        known = f"{', '.join(Metric)}; {', '.join(Aggregate)}"
        raise ConfigError(f"{error}; there are: {known}") from None
    if k is not None and how is not Aggregate.FIRST_K:
        raise ConfigError(f"--k needs --aggregate first_k, not {how}")
    return Criterion(chosen, how, k or int(preset.get("k", 5)), includes_end_token(run))


def for_rate(run: Run, setting: Criterion, rate: float) -> Calibration:
    """Choose the threshold with the largest share of retransmitted questions up to `rate`.

    Raises:
        ConfigError: `rate` is not in 0 to 1, or every threshold sends more.
    """
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"the target rate must be between 0 and 1, not {rate}")
    drawn = curve(run, setting)
    fit = np.flatnonzero(drawn.rate <= rate)
    if not len(fit):
        least = f"{drawn.rate[0]:.3f}"
        raise ConfigError(f"no threshold of {setting.name} sends fewer than {least} of the samples")
    return _calibration(run, drawn, int(fit[-1]), {"target_rate": rate})


def for_bytes(run: Run, setting: Criterion, max_bytes: float) -> Calibration:
    """Choose the most accurate threshold within a budget of bytes; on ties the cheapest.

    Args:
        max_bytes: mean bytes that the edge sends for a question, everything included.

    Raises:
        ConfigError: the views alone cost more.
    """
    drawn = curve(run, setting)
    fit = np.flatnonzero(drawn.bytes_up <= max_bytes)
    if not len(fit):
        least = f"{drawn.bytes_up[0]:,.0f}"
        raise ConfigError(
            f"questions with their views alone take {least} bytes, more than {max_bytes:,.0f}; "
            "a lower --view-quality would help"
        )
    best = int(fit[np.argmax(drawn.accuracy[fit])])
    return _calibration(run, drawn, best, {"max_bytes": max_bytes})


def for_loss(
    run: Run,
    setting: Criterion,
    max_loss: float,
    confidence: float,
    *,
    most_per_picture: int = 1,
    seed: int = 0,
) -> Calibration:
    """Choose the threshold that sends the fewest samples with a guaranteed loss.

    The guarantee is that of `eval.analysis.guarantee`.

    Args:
        run: the run.
        setting: the criterion.
        max_loss, confidence, most_per_picture, seed: as for `guaranteed`.

    Raises:
        ConfigError: a bound, confidence or number is out of range.
    """
    losses = column(run, "second_score") - column(run, "first_score")
    values = uncertainty(run, setting)
    images = [record.image_id for record in run.records]
    found = guaranteed(
        values,
        losses,
        images,
        setting.metric,
        max_loss=max_loss,
        confidence=confidence,
        most_per_picture=most_per_picture,
        seed=seed,
    )
    drawn = curve(run, setting)
    margin = setting.metric is Metric.MARGIN
    kept = values > found.eta if margin else values < found.eta
    target: dict[str, Any] = {
        "max_accuracy_loss": max_loss,
        "confidence": confidence,
        "bound_on": (
            "mean over pictures of the mean loss of each one's questions"
            if most_per_picture == 1
            else "mean loss over questions, those of a picture counting as at most_per_picture"
        ),
        "most_per_picture": most_per_picture,
        "pictures": found.pictures,
        "questions_about_one": [found.fewest, found.largest],
        "seed": seed,
    }
    # All thresholds between two reachable ones send the same samples.
    place = int(np.flatnonzero(drawn.sent == len(values) - kept.sum())[0])
    notes = [*_loss_notes(found, most_per_picture), *_not_whole(run, found)]
    calibration = _calibration(run, drawn, place, target, *notes)
    lost, cluster = losses * kept, np.unique(images, return_inverse=True)[1]
    picture_losses = np.bincount(cluster, weights=lost) / np.bincount(cluster)
    expected = {"loss": float(lost.mean()), "loss_by_picture": float(picture_losses.mean())}
    return msgspec.structs.replace(
        calibration, eta=found.eta, expected={**calibration.expected, **expected}
    )


def _loss_notes(found: GuaranteedThreshold, most_per_picture: int) -> list[str]:
    """Notes that explain what the bound covers."""
    notes = []
    if found.place == 0:
        notes.append(
            "no threshold passed the test for this loss, so every question is sent, which loses "
            "nothing; more pictures would help"
        )
    if most_per_picture == 1 and found.fewest < found.largest:
        notes.append(
            f"pictures have {found.fewest} to {found.largest} questions here, and each counts "
            "once: the bound is on the mean over pictures, not over questions. If the largest "
            "possible number is known without these data, give it with --most-per-picture"
        )
    elif most_per_picture > 1 and found.over:
        notes.append(
            f"{found.over} of {found.pictures} pictures have more than {most_per_picture} "
            f"questions and count as {most_per_picture}: the bound is not on the mean over all "
            "questions"
        )
    return notes


def _not_whole(run: Run, found: GuaranteedThreshold) -> list[str]:
    """A note if the run may lack some questions of its pictures: then the bound may not hold.

    There is no note if all pictures have the same number of questions, because then none is
    over-represented. A limit does no harm if the rows of a picture are adjacent, because it cuts
    only the last picture.
    """
    if found.fewest == found.largest:
        return []
    task, images, why = run.provenance["task"], [one.image_id for one in run.records], []
    limit = task.get("limit")
    together = 1 + sum(a != b for a, b in pairwise(images)) == found.pictures
    if limit is not None and limit <= int(task.get("samples") or 0) and not together:
        why.append(
            f"--limit {limit} took questions, not whole pictures, so pictures with many questions "
            "are over-represented"
        )
    if run.missing > 0:
        why.append(f"{run.missing} samples have no row")
    if not why:
        return []
    return [f"the bound holds only for whole pictures, but {' and '.join(why)}"]


def _calibration(
    run: Run, drawn: Curve, place: int, target: dict[str, Any], *notes: str
) -> Calibration:
    setting, never_always = drawn.setting, end_points(run)
    sent = np.zeros(len(run.records))
    sent[drawn.order[: drawn.sent[place]]] = 1.0
    sent *= sends_region(run)
    low, high = Bootstrap.of(run).mean(sent)
    model, task = run.provenance["model"], run.provenance["task"]
    preset = model.get("preset") or {}
    all_notes = [*notes, *reported_note(str(task["name"]), str(task["split"]))]
    first_k = setting.aggregate is Aggregate.FIRST_K
    return Calibration(
        format=1,
        model=str(model["name"]),
        metric=setting.metric,
        aggregate=setting.aggregate,
        **({"k": setting.k} if first_k else {}),
        eta=float(drawn.eta[place]),
        layer=preset.get("layer"),
        expected={
            "rate": float(drawn.rate[place]),
            "rate_interval_95": [low, high],
            "accuracy": float(drawn.accuracy[place]),
            "accuracy_never": never_always[0].accuracy,
            "accuracy_always": never_always[1].accuracy,
            "bytes_up": float(drawn.bytes_up[place]),
        },
        made={
            **target,
            **({"note": "; ".join(all_notes)} if all_notes else {}),
            "run": run.folder.name,
            "task": task["name"],
            "split": task["split"],
            "scorer": task["scorer"],
            "samples": len(run.records),
            "include_end": setting.include_end,
            "weights": model.get("weights"),
            "codec": run.provenance.get("codec"),
        },
    )
