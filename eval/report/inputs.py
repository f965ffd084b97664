"""Which run plays which part in a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.baselines.base import same_samples
from eval.harness.curves import counts_end, part, rescored
from eval.harness.runs import HD, TWO_STAGE, Run
from server_plugin.calibration import Calibration
from vlm_collab.errors import ConfigError
from vlm_collab.policy import Metric

FEWEST = 30
"""Samples of a kind of question that gets a panel of its own."""

_PARTS = {"signs": {"reading numbers": ("number",), "yes or no": ("presence", "colour")}}
"""Kinds of questions that stand for the paper's two tasks in its Fig. 4 and 5 (TextVQA and POPE),
where one generated benchmark has both."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The runs of a report.

    Attributes:
        main: whose task, split and model it is about; of the method two_stage.
        hd: LLaVA-1.5-HD on the same samples.
        tasks: the same model on other tasks, or other settings of the task.
        models: other models on the same samples.
        qualities: the same model on the same task, with pictures encoded otherwise.
        val: the same model and task on a split that is not reported; thresholds come from it.
        layers: what `calibrate layers` found.
        resamples, seed: of bootstraps.
    """

    main: Run
    hd: Run | None = None
    tasks: Sequence[Run] = ()
    models: Sequence[Run] = ()
    qualities: Sequence[Run] = ()
    val: Run | None = None
    layers: Calibration | None = None
    resamples: int = 1000
    seed: int = 0

    @property
    def runs(self) -> list[Run]:
        """All of them, the main one first."""
        found = [self.main, self.hd, *self.tasks, *self.models, *self.qualities, self.val]
        return [run for run in found if run is not None]

    @property
    def include_end(self) -> bool:
        """Whether the main run's policy counts the end token."""
        return counts_end(self.main)

    @property
    def metrics(self) -> list[Metric]:
        """Those that the main run knows; one over a service knows min-entropy alone."""
        first = self.main.records[0]
        known = {
            Metric.MIN_ENTROPY: first.first_min_entropy,
            Metric.ENTROPY: first.first_entropy,
            Metric.MARGIN: first.first_margin,
        }
        return [metric for metric, values in known.items() if values and values[0] == values[0]]

    def parts(self) -> list[tuple[str, Run]]:
        """What Fig. 4, 5, 6 and 8 have a panel for: tasks, if there are several; else the whole
        of the one and its halves."""
        if self.tasks:
            return [(title_of(run), run) for run in (self.main, *self.tasks)]
        task = str(self.main.provenance["task"]["name"])
        made = [("all questions", self.main)]
        for title, kinds in _PARTS.get(task, {}).items():
            count = sum(record.category in kinds for record in self.main.records)
            if count >= FEWEST:
                made.append((title, of_kinds(self.main, kinds)))
        return made

    def kinds(self) -> list[tuple[str, Run]]:
        """What Fig. 9 has a panel for: tasks, or the kinds of questions of the only one."""
        if self.tasks:
            return self.parts()
        names = list(dict.fromkeys(record.category for record in self.main.records))
        made = [(name, of_kinds(self.main, (name,))) for name in names if name]
        large = [(name, run) for name, run in made if len(run.records) >= FEWEST]
        return large or [("all questions", self.main)]


def of_kinds(run: Run, kinds: Sequence[str]) -> Run:
    """The questions of some kinds."""
    return part(run, lambda record: record.category in kinds)


def title_of(run: Run) -> str:
    """A task as people know it."""
    task = run.provenance["task"]
    ocr = " + OCR" if task.get("settings", {}).get("ocr") else ""
    return f"{task['name']}{ocr}"


def sort_runs(
    runs: Sequence[Run],
    *,
    val: Run | None = None,
    layers: Calibration | None = None,
    scorer: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Inputs:
    """Find out what each run is for.

    Args:
        runs: the first is the main one.
        val, layers, resamples, seed: as of `Inputs`.
        scorer: of the main run's task, instead of its default.

    Raises:
        ConfigError: a run fits nowhere; the validation run is of the split that is reported, or
            has pictures of it, or was asked otherwise.
    """
    if not runs:
        raise ConfigError("a report needs a run")
    main = runs[0]
    main.require(TWO_STAGE)
    if scorer is not None:
        runs = [rescored(run, scorer) if _task(run) == _task(main) else run for run in runs]
        val = None if val is None else rescored(val, scorer)
        main = runs[0]
    found: dict[str, list[Run]] = {name: [] for name in ("hd", "tasks", "models", "qualities")}
    for run in runs[1:]:
        found[_part_of(run, main)].append(run)
    if len(found["hd"]) > 1:
        raise ConfigError("a report has room for one run of hd")
    for run in (*found["hd"], *found["models"]):
        same_samples([main, run])
    if val is not None:
        val.require(TWO_STAGE)
        if _task(val) != _task(main) or _model(val) != _model(main):
            raise ConfigError(f"{val.folder} is of another model or task than {main.folder}")
        if _split(val) == _split(main):
            raise ConfigError(f"{val.folder} is of the split that is reported: {_split(val)}")
        if _codec(val) != _codec(main):
            raise ConfigError(f"{val.folder} has pictures of another quality than {main.folder}")
        if _asked(val) != _asked(main):
            raise ConfigError(f"{val.folder} was asked otherwise than {main.folder} (OCR, prompt)")
        # Two splits may be of the same pictures, as POPE's are.
        both = {one.image_id for one in val.records} & {one.image_id for one in main.records}
        if both:
            raise ConfigError(f"{len(both)} pictures of {val.folder} are reported; take others")
    if layers is not None:
        layers.require_model(str(main.provenance["model"]["name"]))
        if (layers.made.get("task"), layers.made.get("split")) == (_task(main), _split(main)):
            raise ConfigError("the layers were measured on the split that is reported")
    return Inputs(
        main=main,
        hd=next(iter(found["hd"]), None),
        tasks=found["tasks"],
        models=found["models"],
        qualities=found["qualities"],
        val=val,
        layers=layers,
        resamples=resamples,
        seed=seed,
    )


def _part_of(run: Run, main: Run) -> str:
    if run.method == HD:
        return "hd"
    run.require(TWO_STAGE)
    if _split(run) != _split(main) and _task(run) == _task(main):
        raise ConfigError(
            f"{run.folder} is of the split {_split(run)}, the report of {_split(main)}; "
            "a run that thresholds come from is given by --val"
        )
    same_task = _task(run) == _task(main) and _settings(run) == _settings(main)
    if _model(run) != _model(main):
        if same_task:
            return "models"
        raise ConfigError(f"{run.folder} is of another model and of another task than the first")
    if not same_task:
        return "tasks"
    if _codec(run) != _codec(main):
        return "qualities"
    raise ConfigError(f"{run.folder} repeats {main.folder}")


def _task(run: Run) -> str:
    return str(run.provenance["task"]["name"])


def _split(run: Run) -> str:
    return str(run.provenance["task"]["split"])


def _settings(run: Run) -> Any:
    return run.provenance["task"].get("settings")


def _asked(run: Run) -> tuple[Any, ...]:
    """The task's settings that change questions; files are every split's own."""
    settings = _settings(run) or {}
    return bool(settings.get("ocr")), settings.get("post_prompt")


def _model(run: Run) -> tuple[Any, ...]:
    model = run.provenance["model"]
    return model.get("name"), model.get("weights")


def _codec(run: Run) -> Any:
    return run.provenance.get("codec")
