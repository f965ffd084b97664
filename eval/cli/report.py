"""`vlm-collab eval sweep` and `vlm-collab eval report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from eval.analysis.records import TWO_STAGE
from eval.analysis.run import Run, open_run
from vlm_collab.errors import ConfigError
from vlm_collab.method.policy import Aggregate, Metric

T = TypeVar("T", Metric, Aggregate)


def sweep(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="min_entropy, entropy or margin; repeat for several. All by default."),
    ] = None,
    aggregate: Annotated[
        list[str] | None,
        typer.Option(help="full, first_k or first; repeat for several. All by default."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of tokens for first_k; repeat for several. 2 to 10 by default."
        ),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Score the answers with another scorer of the task.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Only questions of this kind.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; by default `sweep` in the run's folder.")
    ] = None,
) -> None:
    """Compute every trade-off curve of a run, at each reachable threshold, without the model.

    Writes sweep.parquet, sweep.csv, sweep.json and sweep.png.
    """
    # Imported late: matplotlib would slow down `--help`.
    from eval.analysis.curves import part, settings_of, with_scores
    from eval.report.sweep import sweep as sweep_run
    from eval.report.sweep import write

    opened = open_run(run)
    opened.require(TWO_STAGE)
    print_gaps(opened)
    if scorer is not None:
        opened = with_scores(opened, scorer)
    if category is not None:
        opened = part(opened, lambda record: record.category == category)
    settings = settings_of(
        opened,
        [_one_of(Metric, "metric", one) for one in metric or list(Metric)],
        [_one_of(Aggregate, "aggregate", one) for one in aggregate or list(Aggregate)],
        k,
    )
    if not settings:
        raise ConfigError(f"no answer of {run} is longer than k tokens; take --aggregate full")
    folder = out or run / "sweep"
    curves = sweep_run(opened, settings)
    write(opened, curves, folder)
    points = sum(len(one.sent) for one in curves)
    print(f"{folder}: {len(curves)} curves, {points} operating points")


def print_gaps(*runs: Run) -> None:
    """Print on stderr which runs lack samples."""
    for run in runs:
        if run.gaps:
            print(run.gaps, file=sys.stderr)


def _one_of(kind: type[T], option: str, name: str) -> T:
    try:
        return kind(name)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError(f"there is no {option} {name!r}; there are: {known}") from None


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs. The first is the main one. Each other is used for HD, tasks, "
            "models or picture qualities, depending on its method, task, model and codec."
        ),
    ],
    val: Annotated[
        Path | None,
        typer.Option(help="Run of the same model and task on another split, for thresholds."),
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(help="File written by `vlm-collab calibrate layers`.")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Score the answers with another scorer of the task.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmark's data, for Fig. 11.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="png or pdf; repeat for both, which is the default."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Number of bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    against: Annotated[
        Path | None, typer.Option(help="Another report.json; print where numbers differ.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("report"),
) -> None:
    """Make the figures and tables of Song and Kim (2025) from runs.

    A JSON file traces each number to the rows that it comes from.
    """
    import json

    from tqdm import tqdm

    from eval.report.differences import differences
    from eval.report.inputs import sort_runs
    from eval.report.write import FORMATS, RESULTS, relative_path, write_report
    from server_plugin.models.calibration import load_calibration

    for one in formats or ():
        if one not in FORMATS:
            raise ConfigError(f"there is no format {one!r}; there are: {', '.join(FORMATS)}")
    before = None
    if against is not None:
        try:
            before = json.loads(against.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{against} is not a report: {error}") from error
    inputs = sort_runs(
        [open_run(path) for path in runs],
        val=None if val is None else open_run(val),
        layers=None if layers is None else load_calibration(layers),
        scorer=scorer,
        resamples=resamples,
        seed=seed,
    )
    print_gaps(*inputs.sources)
    for note in inputs.notes:
        print(note, file=sys.stderr)
    command = ["vlm-collab", "eval", "report", *(relative_path(out, path) for path in runs)]
    for option, path in (("--val", val), ("--layers", layers), ("--data", data)):
        command += [] if path is None else [option, relative_path(out, path)]
    command += [] if scorer is None else ["--scorer", scorer]
    command += ["--resamples", str(resamples), "--seed", str(seed)]
    command += [part for one in formats or () for part in ("--format", one)]
    with tqdm(total=18, unit="part", disable=None if sys.stderr.isatty() else True) as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        results = write_report(
            inputs,
            out,
            formats=formats or FORMATS,
            data=data,
            command=[*command, "--out", "."],
            progress=advance,
        )
    counts = f"{len(results['figures'])} figures, {len(results['tables'])} tables"
    print(f"{out}: {counts}, {RESULTS}, index.md")
    for name, why in results["left_out"].items():
        print(f"left out: {name}: {why}")
    if before is not None:
        lines = differences(before, results)
        print(f"against {against}: {len(lines)} numbers or series moved")
        for line in lines:
            print(f"  {line}")
