"""`vlm-collab eval sweep` and `vlm-collab eval report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from eval.harness.runs import open_run
from vlm_collab.errors import ConfigError
from vlm_collab.policy import Aggregate, Metric

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
        typer.Option(min=1, help="Tokens of first_k; repeat for several. 2 to 10 by default."),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Score the answers again by another rule of the task.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Only questions of this kind.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default `sweep` in the run's.")
    ] = None,
) -> None:
    """Draw every trade-off curve of a run, for each reachable threshold, without the model.

    Writes sweep.parquet, sweep.csv, sweep.json and sweep.png.
    """
    # matplotlib takes a moment; not for `--help`.
    from eval.harness.curves import part, rescored, settings_of
    from eval.harness.sweep import sweep as sweep_run
    from eval.harness.sweep import write

    opened = open_run(run)
    opened.require("two_stage")
    if scorer is not None:
        opened = rescored(opened, scorer)
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


def _one_of(kind: type[T], option: str, name: str) -> T:
    try:
        return kind(name)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError(f"there is no {option} {name!r}; there are: {known}") from None
