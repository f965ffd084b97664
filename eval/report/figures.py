"""Data of the figures with accuracy over cost: Fig. 4, 5, 6, 8, 9, 10 and 12.

The figures are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349). Each function returns all data of its figure;
`eval.report.panels.draw_panels` draws them.
"""

from __future__ import annotations

from typing import Any

from eval.analysis.curves import (
    Criterion,
    area_over_random,
    curve,
    longest_answer,
    part,
)
from eval.analysis.run import Run
from eval.analysis.thresholds import for_loss
from eval.analysis.trace import rows_of
from eval.report.inputs import Inputs, title_of
from eval.report.panels import (
    PAPER_FLOPS,
    PIXELS,
    RELATIVE_BYTES,
    SPENT_FLOPS,
    Axis,
    Panel,
    line,
    panel,
)
from server_plugin.models.calibration import Calibration
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric

METRIC_NAMES = {
    Metric.MIN_ENTROPY: "min-entropy",
    Metric.ENTROPY: "Shannon entropy",
    Metric.MARGIN: "probability margin",
}
MAX_LOSS, CONFIDENCE = 0.01, 0.95
"""Guarantee of the threshold that figures mark if there is a validation run."""


def fig4(inputs: Inputs) -> dict[str, Any]:
    """Accuracy over communication, with HD's point, random line and oracle."""
    return _proposed(
        inputs,
        "Accuracy against communication (Fig. 4)",
        "additional communication cost (pixels)",
        lambda run: [line("min-entropy", run, _default(inputs), PIXELS, inputs.bootstrap(run))],
        PIXELS,
    )


def fig5(inputs: Inputs) -> dict[str, Any]:
    """Accuracy over computation, by the paper's count and as executed.

    Marks and random line use the paper's count, if it is known.
    """

    def lines(run: Run) -> list[dict[str, Any]]:
        drawn = [] if run.decoder is None else [("Eq. 17-20", PAPER_FLOPS)]
        drawn.append(("as executed", SPENT_FLOPS))
        bootstrap = inputs.bootstrap(run)
        return [line(name, run, _default(inputs), axis, bootstrap) for name, axis in drawn]

    axis = SPENT_FLOPS if inputs.main.decoder is None else PAPER_FLOPS
    title = "Accuracy against computation (Fig. 5)"
    label = "relative computation cost (first passes = 1)"
    return _proposed(inputs, title, label, lines, axis) | {"bands": [0, 1]}


def fig6(inputs: Inputs) -> dict[str, Any]:
    """Uncertainty metrics, each averaged over the whole answer."""
    return _trade_offs(
        "Uncertainty metrics, mean over the answer (Fig. 6)",
        [
            panel(
                title,
                run,
                [
                    line(
                        METRIC_NAMES[metric],
                        run,
                        Criterion(metric, include_end=inputs.include_end),
                        PIXELS,
                        inputs.bootstrap(run),
                    )
                    for metric in inputs.metrics
                ],
                PIXELS,
            )
            for title, run in inputs.parts()
        ],
    ) | {"dashed": True}


def fig8(inputs: Inputs) -> dict[str, Any]:
    """Min-entropy averaged over the first tokens of the answer, and over all."""

    def lines(run: Run) -> list[dict[str, Any]]:
        bootstrap, end = inputs.bootstrap(run), inputs.include_end
        longest = longest_answer(run)
        criteria = [("full average", Criterion(include_end=end))]
        criteria.append(("starting token", Criterion(aggregate=Aggregate.FIRST, include_end=end)))
        criteria += [
            (
                f"{k}-token average",
                Criterion(aggregate=Aggregate.FIRST_K, k=k, include_end=end),
            )
            for k in (2, 3, 5, 10)
            if k < longest
        ]
        return [line(name, run, setting, PIXELS, bootstrap) for name, setting in criteria]

    panels = [panel(title, run, lines(run), PIXELS) for title, run in inputs.parts()]
    return _trade_offs("Aggregation length, min-entropy (Fig. 8)", panels) | {"dashed": True}


def fig9(inputs: Inputs) -> dict[str, Any]:
    """Tasks; if there is only one, its kinds of questions."""
    hd = inputs.hd if not inputs.tasks else None
    panels = []
    for title, run in inputs.kinds():
        drawn = line("min-entropy", run, _default(inputs), PIXELS, inputs.bootstrap(run))
        panels.append(panel(title, run, [drawn], PIXELS, hd=_same(hd, run)))
    what = "Tasks" if inputs.tasks else "Kinds of questions"
    return _trade_offs(f"{what} (Fig. 9)", panels) | {"columns": 2 if len(panels) == 4 else 3}


def fig10(inputs: Inputs) -> dict[str, Any]:
    """Models."""
    panels = []
    for run in (inputs.main, *inputs.models):
        drawn = line("min-entropy", run, _default(inputs), PIXELS, inputs.bootstrap(run))
        name = str(run.provenance["model"]["name"])
        panels.append(panel(name.rpartition("/")[2], run, [drawn], PIXELS))
    return _trade_offs(f"Models on {title_of(inputs.main)} (Fig. 10)", panels)


def fig12(inputs: Inputs) -> dict[str, Any] | None:
    """Picture qualities, on the samples that all runs share; None without runs of other quality."""
    runs = [inputs.main, *inputs.qualities]
    if len(runs) == 1 or not inputs.main.records[0].reference_bytes:
        return None
    shared = set.intersection(*({record.id for record in run.records} for run in runs))
    if not shared:
        raise ConfigError("the runs of different qualities have no samples in common")
    lines = []
    for run in sorted(runs, key=quality_of):
        common = part(run, lambda record: record.id in shared)
        bootstrap = inputs.bootstrap(common)
        lines.append(line(quality_name(run), common, _default(inputs), RELATIVE_BYTES, bootstrap))
    count = lines[0]["rows"]
    data = _trade_offs(
        "Picture qualities (Fig. 12)",
        [{"title": "same questions", "rows": count, "lines": lines, "marks": []}],
    )
    label = "relative communication cost (picture bytes over views as JPEG 100)"
    return data | {"x_label": label, "bands": [], "wide": True, "direct": True}


def areas(inputs: Inputs) -> list[dict[str, Any]]:
    """Area over the random line of each criterion, and its difference from that of
    min-entropy/full, with intervals from the same resamples."""
    rows = []
    for title, run in inputs.parts():
        bootstrap = inputs.bootstrap(run)
        drawn = curve(run, _default(inputs))
        base, of_base = area_over_random(drawn, run), bootstrap.areas(drawn, run)
        for setting in _compared(inputs, run):
            drawn = curve(run, setting)
            found = bootstrap.areas(drawn, run)
            area = area_over_random(drawn, run)
            rows.append(
                {
                    "part": title,
                    "setting": setting.name,
                    "rows": rows_of(run),
                    "area": area,
                    "area_interval": list(bootstrap.interval(found)),
                    "difference": area - base,
                    "difference_interval": list(bootstrap.interval(found - of_base)),
                }
            )
    return rows


def quality_of(run: Run) -> int:
    """Quality of the run's global views."""
    return int(run.provenance["codec"]["view"][1])


def quality_name(run: Run) -> str:
    """Name of the run's codec and quality, such as "JPEG 50"."""
    codec = run.provenance["codec"]
    name, quality = codec["view"]
    same = codec["region"] == codec["view"]
    of_region = "" if same else f", regions {codec['region'][1]}"
    return f"{str(name).upper()} {quality}{of_region}"


def _compared(inputs: Inputs, run: Run) -> list[Criterion]:
    end, longest = inputs.include_end, longest_answer(run)
    criteria = [Criterion(metric, include_end=end) for metric in inputs.metrics]
    for metric in inputs.metrics:
        criteria.append(Criterion(metric, Aggregate.FIRST, include_end=end))
        criteria += [
            Criterion(metric, Aggregate.FIRST_K, k, end) for k in (2, 3, 5, 10) if k < longest
        ]
    return criteria


def _proposed(inputs: Inputs, title: str, label: str, lines: Any, axis: Axis) -> dict[str, Any]:
    found, setting = _chosen(inputs), _default(inputs)
    panels: list[Panel] = []
    for name, run in inputs.parts():
        # HD and threshold belong to the main run, not to the same task with other settings.
        mine = run.folder == inputs.main.folder
        hd = _same(inputs.hd, run) if mine else None
        eta = found.eta if mine and found is not None else None
        content = panel(name, run, lines(run), axis, hd=hd, eta=eta, setting=setting)
        for one in content["marks"]:
            if found is not None and "eta" in one:
                one |= chosen_on(inputs, found)
        panels.append(content)
    return _trade_offs(title, panels) | {"x_label": label}


def _trade_offs(title: str, panels: list[Panel]) -> dict[str, Any]:
    return {
        "title": title,
        "x_label": "additional communication cost (pixels)",
        "y_label": "accuracy",
        "panels": panels,
    }


def _default(inputs: Inputs) -> Criterion:
    return Criterion(include_end=inputs.include_end)


def chosen_on(inputs: Inputs, found: Calibration) -> dict[str, Any]:
    """Where a threshold comes from: rows of the validation run, and the target."""
    assert inputs.val is not None
    names = ("target_rate", "max_accuracy_loss", "confidence", "seed")
    target = {name: found.made[name] for name in names if name in found.made}
    return {"val_rows": rows_of(inputs.val), "target": target}


def _chosen(inputs: Inputs) -> Calibration | None:
    """The validation run's threshold with a guaranteed loss of at most `MAX_LOSS`."""
    if inputs.val is None:
        return None
    return for_loss(inputs.val, _default(inputs), MAX_LOSS, CONFIDENCE)


def _same(hd: Run | None, run: Run) -> Run | None:
    """The run of HD, reduced to the samples of `run`."""
    if hd is None:
        return None
    ids = {record.id for record in run.records}
    return part(hd, lambda record: record.id in ids)
