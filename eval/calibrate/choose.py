"""A threshold from a run: for a rate, a budget of bytes, or a bound on the loss."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from eval.baselines.base import column
from eval.calibrate.guarantee import guaranteed
from eval.harness.curves import Bootstrap, Curve, Setting, counts_end, curve, ends, uncertainty
from eval.harness.runs import Run
from server_plugin.calibration import Calibration
from vlm_collab.errors import ConfigError
from vlm_collab.policy import Aggregate, Metric


def setting_of(run: Run, metric: str | None, aggregate: str | None, k: int | None) -> Setting:
    """What a user asked for; where nothing was, what the run's preset has.

    Raises:
        ConfigError: there is no such metric or aggregation, or `k` goes with another one.
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
    return Setting(chosen, how, k or int(preset.get("k", 5)), counts_end(run))


def for_rate(run: Run, setting: Setting, rate: float) -> Calibration:
    """The threshold whose share of retransmitted questions comes nearest to `rate`, from below.

    Raises:
        ConfigError: `rate` is none, or no threshold sends so few.
    """
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"the target rate must be between 0 and 1, not {rate}")
    drawn = curve(run, setting)
    fit = np.flatnonzero(drawn.rate <= rate)
    if not len(fit):
        least = f"{drawn.rate[0]:.3f}"
        raise ConfigError(f"no threshold of {setting.name} sends fewer than {least} of the samples")
    return _calibration(run, drawn, int(fit[-1]), {"target_rate": rate})


def for_bytes(run: Run, setting: Setting, max_bytes: float) -> Calibration:
    """The most accurate threshold within a budget of bytes; of several the cheapest.

    Args:
        max_bytes: that the edge sends for a question, views and regions and all else, the mean.

    Raises:
        ConfigError: views alone cost more.
    """
    drawn = curve(run, setting)
    fit = np.flatnonzero(drawn.bytes_up <= max_bytes)
    if not len(fit):
        least = f"{drawn.bytes_up[0]:,.0f}"
        raise ConfigError(
            f"questions with their views alone take {least} bytes, more than {max_bytes:,.0f}; "
            "a smaller quality would help"
        )
    best = int(fit[np.argmax(drawn.accuracy[fit])])
    return _calibration(run, drawn, best, {"max_bytes": max_bytes})


def for_loss(
    run: Run, setting: Setting, max_loss: float, confidence: float, seed: int = 0
) -> Calibration:
    """The threshold that sends least, among those with a guarantee (`eval.calibrate.guarantee`).

    Raises:
        ConfigError: a bound or confidence that makes no sense.
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
        seed=seed,
    )
    drawn = curve(run, setting)
    margin = setting.metric is Metric.MARGIN
    sent = int((values <= found.eta).sum() if margin else (values >= found.eta).sum())
    target: dict[str, Any] = {
        "max_accuracy_loss": max_loss,
        "confidence": confidence,
        "pictures": found.pictures,
        "most_questions_about_one": found.largest,
        "seed": seed,
    }
    if found.place == 0:
        target["note"] = (
            "no threshold could be shown to lose so little; every question is sent, which loses "
            "nothing. More pictures would help"
        )
    # Between two reachable thresholds all send the same samples.
    place = int(np.flatnonzero(drawn.sent == sent)[0])
    made = _calibration(run, drawn, place, target)
    return msgspec.structs.replace(made, eta=found.eta)


def _calibration(run: Run, drawn: Curve, place: int, target: dict[str, Any]) -> Calibration:
    setting, never_always = drawn.setting, ends(run)
    sent = np.zeros(len(run.records))
    sent[drawn.order[: drawn.sent[place]]] = 1.0
    low, high = Bootstrap.of(run).mean(sent)
    model, task = run.provenance["model"], run.provenance["task"]
    preset = model.get("preset") or {}
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
