"""`vlm-collab calibrate`: settings for `vlm-collab serve`, chosen on data."""

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
    """`layers`, and what everything else means: a threshold from a run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments are for; a run's folder needs no command's name."""
        if args[0] not in (_THRESHOLD, _LAYERS):
            args = [_THRESHOLD, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=CalibrateCommands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    # Options before the run's folder are the threshold's own.
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)


@app.callback()
def _group() -> None:
    """Choose settings on data, and write a file that `serve --calibration` reads.

    `vlm-collab calibrate RUN --target-rate 0.3` is short for `calibrate threshold RUN …`.
    """


@app.command(_THRESHOLD, cls=Command)
def threshold(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of a split that is not reported.")],
    target_rate: Annotated[
        float | None, typer.Option(help="Share of questions whose region is asked for, 0 to 1.")
    ] = None,
    max_bytes: Annotated[
        float | None, typer.Option(help="Most bytes that the edge sends for a question, the mean.")
    ] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(help="Most accuracy to lose against asking for every region, such as 0.01."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Of --max-accuracy-loss: how often it has to hold.")
    ] = 0.95,
    most_per_picture: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of --max-accuracy-loss: as how many questions a picture counts at most, a number "
            "that is known without the run. By default each picture counts once.",
        ),
    ] = 1,
    metric: Annotated[
        str | None, typer.Option(help="min_entropy, entropy or margin; by default the run's.")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="full, first_k or first; by default the run's.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Tokens of first_k.")] = None,
    scorer: Annotated[str | None, typer.Option(help="Another rule of the task.")] = None,
    out: Annotated[Path, typer.Option(help="The file.")] = Path("calibration.yaml"),
) -> None:
    """Choose the threshold of a run's model."""
    from eval.analysis.curves import rescored
    from eval.analysis.records import TWO_STAGE
    from eval.analysis.run import open_run
    from eval.analysis.thresholds import for_bytes, for_loss, for_rate, setting_of
    from eval.cli.report import tell_gaps

    goals = (target_rate, max_bytes, max_accuracy_loss)
    if sum(goal is not None for goal in goals) != 1:
        raise ConfigError("say one of --target-rate, --max-bytes and --max-accuracy-loss")
    opened = open_run(run)
    opened.require(TWO_STAGE)
    tell_gaps(opened)
    if scorer is not None:
        opened = rescored(opened, scorer)
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
    tell_note(found)
    told = found.expected
    low, high = told["rate_interval_95"]
    print(
        f"{out}: {setting.name}, eta {found.eta:.4g}; sends {told['rate']:.1%} of the regions "
        f"(95 %: {low:.1%} to {high:.1%}), {told['bytes_up']:,.0f} bytes a question, "
        f"accuracy {told['accuracy']:.1%} (never {told['accuracy_never']:.1%}, "
        f"always {told['accuracy_always']:.1%})"
    )


@app.command(_LAYERS, cls=Command)
def layers(
    task: Annotated[str, typer.Option(help="A benchmark that says where answers are.")] = "signs",
    model: Annotated[
        str, typer.Option(help="As in `vlm-collab serve`: hub name, local folder, or demo.")
    ] = "demo",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmark's data, in the hub's layout.")
    ] = None,
    split: Annotated[str, typer.Option(help="One that is not reported.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = 300,
    layer: Annotated[
        list[int] | None, typer.Option(help="Only this one; repeat for several.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    preset: PresetFile = None,
    fit: FitName = None,
    prompt: PromptName = None,
    view_px: ViewSide = None,
    out: Annotated[Path, typer.Option(help="The file.")] = Path("calibration.yaml"),
) -> None:
    """Choose the attention layer: the one whose region covers most of the true place.

    Beside the file, a Parquet file of its name holds the region of each sample and layer.
    """
    from eval.analysis.splits import reported_note
    from eval.analysis.trace import ranges
    from eval.runs.layers import best_layer, by_layer, measure_layers, write_looks
    from eval.runs.loading import ModelOptions

    opened = open_task(task, data=data, split=split, limit=limit)
    given = {"preset": preset, "fit": fit, "prompt": prompt, "view_px": view_px}
    given = {name: value for name, value in given.items() if value is not None}
    options = ModelOptions(name=model, device=device, dtype=dtype, overrides=given)
    if (warning := options.preset().warning) is not None:
        print(f"vlm-collab calibrate: {warning}", file=sys.stderr)
    looks, name = asyncio.run(measure_layers(opened, options, layer, shown=sys.stderr.isatty()))
    made = by_layer(looks)
    best = best_layer(made)
    rows = out.with_suffix(".parquet")
    digest = write_looks(rows, looks)
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
            "layers": [msgspec.to_builtins(one) for one in made],
            # The rows that the shares are means of: for each layer these samples of the task.
            "rows": {
                "file": rows.name,
                "index": ranges(look.index for look in looks if look.layer == best.layer),
                "sha256": digest,
            },
            "command": ["vlm-collab", *sys.argv[1:]],
        },
    )
    write(found, out)
    tell_note(found)
    for one in made:
        mark = " *" if one is best else ""
        print(f"layer {one.layer:2}: covers {one.covered:.1%}, whole {one.whole:.1%}{mark}")
    print(f"{out}: layer {best.layer}")


def tell_note(found: Calibration) -> None:
    """What a user should know of a finding, on stderr."""
    if "note" in found.made:
        print(f"vlm-collab calibrate: {found.made['note']}", file=sys.stderr)


def write(found: Calibration, path: Path) -> None:
    """The file, the same for the same findings and command.

    Raises:
        ConfigError: it cannot be written.
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
