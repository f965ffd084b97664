"""`vlm-collab calibrate`: choose settings for `vlm-collab serve` on data."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from edge_client.cli.help import Command, NamedValues
from eval.tasks import open_task
from server_plugin.cli.options import Device, Dtype, FitName, PresetFile, PromptName, ViewSide
from server_plugin.models.calibration import Calibration
from vlm_collab.errors import ConfigError

_THRESHOLD, _LAYERS = "threshold", "layers"


class CalibrateCommands(NamedValues, TyperGroup):
    """The commands `layers` and `threshold`; `threshold` is the default."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; `threshold` is used if the first argument names none."""
        if args[0] not in (_THRESHOLD, _LAYERS):
            args = [_THRESHOLD, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=CalibrateCommands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    # Options before the run's folder belong to `threshold`.
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)


@app.callback()
def _group() -> None:
    """Choose settings on data, and write them to a file for `serve --calibration`.

    `vlm-collab calibrate RUN --target-rate 0.3` is short for `calibrate threshold RUN …`.
    """


@app.command(_THRESHOLD, cls=Command)
def threshold(
    run: Annotated[Path, typer.Argument(help="Folder of a run on a split that is not reported.")],
    target_rate: Annotated[
        float | None, typer.Option(help="Share of questions whose region is requested, 0 to 1.")
    ] = None,
    max_bytes: Annotated[
        float | None, typer.Option(help="Most bytes that the edge sends per question, on average.")
    ] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(help="Largest loss of accuracy against sending every region, such as 0.01."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Probability with which --max-accuracy-loss must hold.")
    ] = 0.95,
    most_per_picture: Annotated[
        int,
        typer.Option(
            min=1,
            help="For --max-accuracy-loss: most questions counted per picture. Choose it without "
            "looking at the run. By default each picture counts once.",
        ),
    ] = 1,
    metric: Annotated[
        str | None, typer.Option(help="min_entropy, entropy or margin; by default the run's.")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="full, first_k or first; by default the run's.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Number of tokens for first_k.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Score the answers with another scorer of the task.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("calibration.yaml"),
) -> None:
    """Choose the threshold of a run's model."""
    from eval.analysis.curves import with_scores
    from eval.analysis.records import TWO_STAGE
    from eval.analysis.run import open_run
    from eval.analysis.thresholds import for_bytes, for_loss, for_rate, setting_of
    from eval.cli.report import print_gaps

    goals = (target_rate, max_bytes, max_accuracy_loss)
    if sum(goal is not None for goal in goals) != 1:
        raise ConfigError("give one of --target-rate, --max-bytes and --max-accuracy-loss")
    opened = open_run(run)
    opened.require(TWO_STAGE)
    print_gaps(opened)
    if scorer is not None:
        opened = with_scores(opened, scorer)
    setting = setting_of(opened, metric, aggregate, k)
    if target_rate is not None:
        found = for_rate(opened, setting, target_rate)
    elif max_bytes is not None:
        found = for_bytes(opened, setting, max_bytes)
    else:
        assert max_accuracy_loss is not None
        found = for_loss(
            opened, setting, max_accuracy_loss, confidence, most_per_picture=most_per_picture
        )
    command = ["vlm-collab", *sys.argv[1:]]
    write(msgspec.structs.replace(found, made={**found.made, "command": command}), out)
    print_note(found)
    expected = found.expected
    low, high = expected["rate_interval_95"]
    print(
        f"{out}: {setting.name}, eta {found.eta:.4g}; sends {expected['rate']:.1%} of the regions "
        f"(95 %: {low:.1%} to {high:.1%}), {expected['bytes_up']:,.0f} bytes a question, "
        f"accuracy {expected['accuracy']:.1%} (never {expected['accuracy_never']:.1%}, "
        f"always {expected['accuracy_always']:.1%})"
    )


@app.command(_LAYERS, cls=Command)
def layers(
    task: Annotated[
        str, typer.Option(help="Benchmark with true boxes, which show where answers are.")
    ] = "signs",
    model: Annotated[
        str, typer.Option(help="As in `vlm-collab serve`: hub name, local folder, or demo.")
    ] = "demo",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmark's data, in the hub's layout.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split that is not reported.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N samples.")] = 300,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Measure only this layer; repeat for several. All by default."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    preset: PresetFile = None,
    fit: FitName = None,
    prompt: PromptName = None,
    view_px: ViewSide = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("calibration.yaml"),
) -> None:
    """Choose the attention layer whose regions cover most of the true boxes.

    A Parquet file of the same name holds the region of each sample and layer.
    """
    from eval.analysis.splits import reported_note
    from eval.analysis.trace import ranges
    from eval.runs.layers import best_layer, by_layer, measure_layers, write_regions
    from eval.runs.loading import ModelOptions

    opened = open_task(task, data=data, split=split, limit=limit)
    given = {"preset": preset, "fit": fit, "prompt": prompt, "view_px": view_px}
    given = {name: value for name, value in given.items() if value is not None}
    options = ModelOptions(name=model, device=device, dtype=dtype, overrides=given)
    if (warning := options.preset().warning) is not None:
        print(f"vlm-collab calibrate: {warning}", file=sys.stderr)
    regions, name = asyncio.run(measure_layers(opened, options, layer, shown=sys.stderr.isatty()))
    results = by_layer(regions)
    best = best_layer(results)
    rows = out.with_suffix(".parquet")
    digest = write_regions(rows, regions)
    notes = reported_note(task, opened.split)
    found = Calibration(
        format=1,
        model=name,
        layer=best.layer,
        expected={"covered": best.covered, "whole": best.whole},
        made={
            **({"note": "; ".join(notes)} if notes else {}),
            "task": task,
            "split": opened.split,
            "samples": best.samples,
            **({"model_options": given} if given else {}),
            "layers": [msgspec.to_builtins(one) for one in results],
            # The rows behind the shares: these samples of the task, for each layer.
            "rows": {
                "file": rows.name,
                "index": ranges(region.index for region in regions if region.layer == best.layer),
                "sha256": digest,
            },
            "command": ["vlm-collab", *sys.argv[1:]],
        },
    )
    write(found, out)
    print_note(found)
    for one in results:
        mark = " *" if one is best else ""
        print(f"layer {one.layer:2}: covers {one.covered:.1%}, whole {one.whole:.1%}{mark}")
    print(f"{out}: layer {best.layer}")


def print_note(found: Calibration) -> None:
    """Print the calibration's note, if any, on stderr."""
    if "note" in found.made:
        print(f"vlm-collab calibrate: {found.made['note']}", file=sys.stderr)


def write(found: Calibration, path: Path) -> None:
    """Write the calibration as YAML; equal calibrations give equal files.

    Raises:
        ConfigError: the file cannot be written.
    """
    import yaml

    fields = {
        name: value for name, value in msgspec.to_builtins(found).items() if value is not None
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
