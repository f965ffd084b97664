"""Inputs of a report: the role of each run, and checks that the runs fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from eval.analysis.curves import Bootstrap, includes_end_token, part, with_scores
from eval.analysis.operating_points import same_samples
from eval.analysis.records import HD, TWO_STAGE
from eval.analysis.run import Run
from eval.runs.provenance import difference
from eval.tasks.catalogue import task_kind
from eval.tasks.data import without_locations
from server_plugin.models.calibration import Calibration
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Metric

FEWEST = 30
"""Fewest samples of a kind of question for a panel of its own."""

_NOT_IN_ROWS = {
    *("metric", "aggregate", "eta", "k"),  # policies are applied to rows later
    *("models", "family_default", "prompts", "turns"),  # models that use it, and its choices
    *("codec", "quality"),  # `run.json` has the codec in use elsewhere
}
"""Fields of a preset that do not influence the rows of a run."""

_PARTS = {"signs": {"reading numbers": ("number",), "yes or no": ("presence", "colour")}}
"""Kinds of questions of the generated benchmark that correspond to TextVQA and POPE, the tasks of
the paper's Fig. 4 and 5."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The runs of a report. `main`, `hd` and `models` hold only samples that all of them have.

    Attributes:
        main: the reported run, of the method two_stage; sets the task, split and model.
        hd: LLaVA-1.5-HD on the same samples.
        tasks: the same model on other tasks, or with other settings of the task.
        models: other models on the same samples.
        qualities: the same model and task, with another codec or quality.
        val: the same model and task on a split that is not reported; thresholds come from it.
        layers: result of `calibrate layers`.
        given: the same runs with all of their rows, in the order of `runs`; empty if `runs` has
            all rows.
        notes: remarks on these inputs for the reader, one line each.
        resamples, seed: resamples of bootstraps, and their seed.
    """

    main: Run
    hd: Run | None = None
    tasks: Sequence[Run] = ()
    models: Sequence[Run] = ()
    qualities: Sequence[Run] = ()
    val: Run | None = None
    layers: Calibration | None = None
    given: Sequence[Run] = ()
    notes: Sequence[str] = ()
    resamples: int = 1000
    seed: int = 0

    def bootstrap(self, run: Run) -> Bootstrap:
        """The bootstrap of one of the runs, or of a part of it."""
        return Bootstrap.of(run, resamples=self.resamples, seed=self.seed)

    @property
    def sources(self) -> list[Run]:
        """The runs with all of their rows, for provenance."""
        return list(self.given) or self.runs

    @property
    def runs(self) -> list[Run]:
        """All runs, the main one first."""
        found = [self.main, self.hd, *self.tasks, *self.models, *self.qualities, self.val]
        return [run for run in found if run is not None]

    @property
    def include_end(self) -> bool:
        """Whether the main run's policy counts the end token."""
        return includes_end_token(self.main)

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that the main run recorded; a run over a service has min-entropy only."""
        first = self.main.records[0]
        known = {
            Metric.MIN_ENTROPY: first.first_min_entropy,
            Metric.ENTROPY: first.first_entropy,
            Metric.MARGIN: first.first_margin,
        }
        return [metric for metric, values in known.items() if values and values[0] == values[0]]

    def parts(self) -> list[tuple[str, Run]]:
        """Titles and runs of the panels in Fig. 4, 5, 6 and 8.

        Several tasks have one panel each. A single task has one panel for all questions, and one
        for each part.
        """
        if self.tasks:
            runs = (self.main, *self.tasks)
            return list(zip(_titles(runs), runs, strict=True))
        task = str(self.main.provenance["task"]["name"])
        panels = [("all questions", self.main)]
        for title, kinds in _PARTS.get(task, {}).items():
            count = sum(record.category in kinds for record in self.main.records)
            if count >= FEWEST:
                panels.append((title, run_of_kinds(self.main, kinds)))
        return panels

    def kinds(self) -> list[tuple[str, Run]]:
        """Titles and runs of the panels in Fig. 9: tasks, or the kinds of questions of the only
        task."""
        if self.tasks:
            return self.parts()
        names = list(dict.fromkeys(record.category for record in self.main.records))
        panels = [(name, run_of_kinds(self.main, (name,))) for name in names if name]
        large = [(name, run) for name, run in panels if len(run.records) >= FEWEST]
        return large or [("all questions", self.main)]


def run_of_kinds(run: Run, kinds: Sequence[str]) -> Run:
    """The run with only questions of these kinds."""
    return part(run, lambda record: record.category in kinds)


def title_of(run: Run) -> str:
    """Title of the run's task."""
    task = run.provenance["task"]
    ocr = " + OCR" if task.get("settings", {}).get("ocr") else ""
    return f"{task['name']}{ocr}"


def _titles(runs: Sequence[Run]) -> list[str]:
    """Unique panel titles: the task, with the split or else the folder if tasks repeat."""
    plain = [title_of(run) for run in runs]
    full = [f"{title}, {_split(run)}" for title, run in zip(plain, runs, strict=True)]
    titles = [
        long if plain.count(short) > 1 else short for short, long in zip(plain, full, strict=True)
    ]
    return [
        f"{title} ({run.folder.name})" if titles.count(title) > 1 else title
        for title, run in zip(titles, runs, strict=True)
    ]


def sort_runs(
    runs: Sequence[Run],
    *,
    val: Run | None = None,
    layers: Calibration | None = None,
    scorer: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Inputs:
    """Determine the role of each run in a report.

    Args:
        runs: the runs; the first is the main one.
        val, layers, resamples, seed: as for `Inputs`.
        scorer: scorer of the main run's task; None for its default.

    Raises:
        ConfigError: a run has no role in the report, or used the model with other settings; the
            validation run is of a reported split, shares pictures with it, or has other settings
            of the task.
    """
    if not runs:
        raise ConfigError("a report needs a run")
    main = runs[0]
    main.require(TWO_STAGE)
    if scorer is not None:
        runs = [with_scores(run, scorer) if _task(run) == _task(main) else run for run in runs]
        val = None if val is None else with_scores(val, scorer)
        main = runs[0]
    found: dict[str, list[Run]] = {name: [] for name in ("hd", "tasks", "models", "qualities")}
    for run in runs[1:]:
        found[_part_of(run, main)].append(run)
    if len(found["hd"]) > 1:
        raise ConfigError("a report takes only one run of the method hd")
    cut = same_samples([main, *found["hd"], *found["models"]])
    if val is not None:
        _check_val(val, main, found["tasks"])
    if layers is not None:
        layers.require_model(str(main.provenance["model"]["name"]))
        if (layers.made.get("task"), layers.made.get("split")) == (_task(main), _split(main)):
            raise ConfigError("the layers were measured on the reported split; measure on another")
    given = Inputs(
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
    main, *others = cut
    count = len(found["hd"])
    return replace(
        given,
        main=main,
        hd=next(iter(others[:count]), None),
        models=others[count:],
        given=given.runs,
        notes=_left_out([given.main, *found["hd"], *found["models"]], len(main.records)),
    )


def _left_out(runs: Sequence[Run], shared: int) -> list[str]:
    """A note on the samples that `same_samples` left out, if any; `shared` is the number left."""
    every = set().union(*({record.id for record in run.records} for run in runs))
    if len(every) == shared:
        return []
    lacking = [(run.folder.name, len(every) - len(run.records)) for run in runs]
    listed = ", ".join(f"{name} {count}" for name, count in lacking if count)
    return [
        f"{len(every) - shared} of {len(every)} samples are left out of all figures: of the runs "
        f"that are compared, some lack them ({listed})"
    ]


def _check_val(val: Run, main: Run, tasks: Sequence[Run]) -> None:
    """Refuse a validation run whose thresholds would not transfer to the main run, or that shares
    pictures with reported runs."""
    val.require(TWO_STAGE)
    if _task(val) != _task(main) or _model(val) != _model(main):
        raise ConfigError(f"{val.folder} has another model or task than {main.folder}")
    reported = [main, *(run for run in tasks if _task(run) == _task(main))]
    if _split(val) in {_split(run) for run in reported}:
        raise ConfigError(
            f"{val.folder} is a run of the reported split {_split(val)}; thresholds need another"
        )
    if _codec(val) != _codec(main):
        raise ConfigError(f"{val.folder} has another picture quality than {main.folder}")
    if _asked(val) != _asked(main):
        raise ConfigError(f"{val.folder} has other task settings than {main.folder} (OCR, prompt)")
    _same_use(val, main)
    # Different splits may share pictures, as POPE's do.
    both = {one.image_id for one in val.records}
    both &= {one.image_id for run in reported for one in run.records}
    if both:
        raise ConfigError(f"{len(both)} pictures of {val.folder} are reported; use a run on others")


def _check_hd(run: Run, main: Run) -> None:
    """Refuse a run of LLaVA-1.5-HD with another model or picture quality than the main run.

    Facts that a run over a service lacks are not compared.
    """
    (theirs, codec), (here, of_main) = (
        (one.provenance["model"], _codec(one) or {}) for one in (run, main)
    )
    facts = [(name, theirs.get(name), here.get(name)) for name in ("name", "weights", "dtype")]
    for name, other, mine in (*facts, ("codec", codec.get("view"), of_main.get("view"))):
        if None not in (other, mine) and other != mine:
            what = difference(name, other, mine)
            raise ConfigError(f"{run.folder} cannot be compared with {main.folder} ({what})")


def _part_of(run: Run, main: Run) -> str:
    if run.method == HD:
        if (_task(run), _split(run)) != (_task(main), _split(main)):
            raise ConfigError(f"{run.folder} has another task or split than {main.folder}")
        _check_hd(run, main)
        return "hd"
    run.require(TWO_STAGE)
    one_set = _split(run) == _split(main)
    if _task(run) == _task(main) and not one_set:
        sets = task_kind(_task(main)).sets
        if not {_split(run), _split(main)} <= set(sets):
            named = f"; only its sets {', '.join(sets)} are reported together" if sets else ""
            raise ConfigError(
                f"{run.folder} is a run of the split {_split(run)}, the first of {_split(main)}; "
                f"give a run for thresholds with --val{named}"
            )
    same_task = _task(run) == _task(main) and one_set and _settings(run) == _settings(main)
    if _model(run) != _model(main):
        if same_task:
            return "models"
        raise ConfigError(f"{run.folder} has another model and another task than {main.folder}")
    # Another task has its own longest answer, and may have its own prompt.
    _same_use(run, main, but=() if same_task else ("max_new_tokens", "prompt"))
    if not same_task:
        return "tasks"
    if _codec(run) != _codec(main):
        return "qualities"
    raise ConfigError(f"{run.folder} has the same settings as {main.folder}; leave it out")


def _task(run: Run) -> str:
    return str(run.provenance["task"]["name"])


def _split(run: Run) -> str:
    return str(run.provenance["task"]["split"])


def _settings(run: Run) -> dict[str, Any]:
    return without_locations(run.provenance["task"].get("settings") or {})


def _asked(run: Run) -> dict[str, Any]:
    """The task's settings without files, which differ between splits, and without unset ones."""
    settings = _settings(run).items()
    return {
        name: value for name, value in settings if name != "data" and value not in (None, False)
    }


def _used(run: Run) -> dict[str, Any]:
    """How the model was used: all settings that influence rows."""
    settings: dict[str, Any] = {}
    if run.knows_preset:  # decoding fills in fields that older presets lack
        preset = run.preset
        settings = {**msgspec.to_builtins(preset), "prompt": preset.template}
    settings = {name: value for name, value in settings.items() if name not in _NOT_IN_ROWS}
    model = run.provenance["model"]
    return settings | {name: model.get(name) for name in ("view", "grid", "dtype")}


def _same_use(run: Run, main: Run, but: Sequence[str] = ()) -> None:
    """Refuse a run that used the model with other settings than the main run."""
    theirs, here = _used(run), _used(main)
    for name in sorted(theirs.keys() | here.keys()):
        if name not in but and theirs.get(name) != here.get(name):
            what = difference(name, theirs.get(name), here.get(name))
            raise ConfigError(f"{run.folder} has other model settings than {main.folder} ({what})")


def _model(run: Run) -> tuple[Any, ...]:
    model = run.provenance["model"]
    return model.get("name"), model.get("weights")


def _codec(run: Run) -> Any:
    return run.provenance.get("codec")
