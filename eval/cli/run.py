"""`vlm-collab eval run`: answer a benchmark's questions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_client.cli.options import Token, TokenFile, token_of
from eval.analysis.records import HD, TWO_STAGE
from eval.runs.folder import SAVE_EVERY, RunFolder, begun_threads
from eval.runs.loading import ModelOptions
from eval.runs.loop import RunCounts, Share, StoppedError
from eval.runs.loop import run as run_method
from eval.runs.methods.method import Method
from eval.tasks import Task, open_task
from server_plugin.backends.open import DEMO_MODEL
from server_plugin.cli.options import (
    BaseSide,
    BatchSize,
    Device,
    Dtype,
    Epsilon,
    FitName,
    Layer,
    PlacementName,
    PresetFile,
    PromptName,
    Ratios,
    ViewSide,
    ratios_of,
)
from vlm_collab.errors import CollabError, ConfigError
from vlm_collab.pictures.images import Codec


def run(
    task: Annotated[
        str, typer.Option(help="textvqa, pope, gqa, aokvqa, aokvqa_mc, vqav2 or signs.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="As in `vlm-collab serve`: hub name, local folder, or demo (default)."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmark's data, in the hub's layout.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data; by default the reported one.")
    ] = None,
    ocr: Annotated[bool, typer.Option(help="Give the model the data's OCR tokens.")] = False,
    post_prompt: Annotated[
        str | None,
        typer.Option(
            help="Text after each question. Default: the task's own, or none if the prompt "
            "template already says how to answer, as vicrop does."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N samples.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/MODEL-TASK-SPLIT.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Resume the run that the folder holds.")] = True,
    save_every: Annotated[
        int, typer.Option(min=1, help="Most finished samples kept in memory between writes.")
    ] = SAVE_EVERY,
    method: Annotated[
        str, typer.Option(help="two_stage, or hd for LLaVA-1.5-HD's tiles (no second stage).")
    ] = TWO_STAGE,
    view_quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of global views.")
    ] = None,
    region_quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of regions.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="jpeg, webp or png, for views and regions.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Divide the samples among N processes on this machine.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each process. By default, the number with which the run began; in "
            "a new run, the cores are divided among the processes.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask this running service (ws://…) instead of a local model.")
    ] = None,
    token: Token = None,
    token_file: TokenFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    preset: PresetFile = None,
    fit: FitName = None,
    prompt: PromptName = None,
    view_px: ViewSide = None,
    layer: Layer = None,
    base_px: BaseSide = None,
    ratios: Ratios = None,
    epsilon: Epsilon = None,
    placement: PlacementName = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; by default the benchmark's.")
    ] = None,
    batch: BatchSize = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
) -> None:
    """Answer a benchmark's questions with both stages, whatever the uncertainty, and keep all data.

    The run is a folder with one row for each sample; sweeps and reports need nothing else. You can
    stop it at any time; the same command resumes it.
    """
    share = Share.of_this_process()
    if server is not None and model is not None:
        raise ConfigError("give --model or --server, not both")
    model = model or DEMO_MODEL
    overrides = {
        "preset": preset,
        "fit": fit,
        "prompt": prompt,
        "view_px": view_px,
        "layer": layer,
        "base_px": base_px,
        "ratios": ratios_of(ratios),
        "epsilon": epsilon,
        "placement": placement,
        "max_new_tokens": max_new_tokens,
    }
    options = ModelOptions(
        name=model,
        device=device,
        dtype=dtype,
        batch=batch,
        overrides={name: value for name, value in overrides.items() if value is not None},
    )
    chosen_preset = None if server is not None else options.preset()

    def opened_with(suffix: str | None) -> Task:
        return open_task(task, data=data, split=split, ocr=ocr, limit=limit, post_prompt=suffix)

    opened = opened_with(post_prompt)
    if chosen_preset is not None:
        if share.rank == 0 and chosen_preset.warning is not None:
            print(f"vlm-collab eval run: {chosen_preset.warning}", file=sys.stderr)
        if post_prompt is None and chosen_preset.says_how_to_answer:
            opened = opened_with("") if opened.settings.get("post_prompt") else opened
    if not len(opened):
        raise ConfigError(f"{task} has no samples in its split {opened.split!r}")
    chosen = method_of(
        method,
        opened,
        options,
        codec=codec,
        view_quality=view_quality,
        region_quality=region_quality,
        server=server,
        token=token_of(token, token_file),
    )
    name = "service" if server is not None else Path(model).name
    suffix = "" if method == TWO_STAGE else f"-{method}"
    path = out or Path("runs") / f"{name}-{opened.name}-{opened.split}{suffix}"
    if processes > 1:
        if share.world > 1:
            raise ConfigError("--processes cannot be used if a launcher starts several processes")
        _several(processes, threads or begun_threads(path))
        rows, failed = RunFolder(path).counts()
        _print_result(path, RunCounts(rows, failed, len(opened)), Share(), as_json)
        return
    if chosen_threads := threads or begun_threads(path):
        import torch

        torch.set_num_threads(chosen_threads)
    try:
        ended = asyncio.run(
            run_method(
                chosen,
                opened,
                path,
                share=share,
                limit=limit,
                resume=resume,
                save_every=save_every,
            )
        )
    except StoppedError:
        kept = f"finished samples are in {path}; the same command resumes the run"
        print(f"vlm-collab eval run: stopped; {kept}", file=sys.stderr)
        raise KeyboardInterrupt from None
    _print_result(path, ended, share, as_json)


def method_of(
    name: str,
    task: Task,
    options: ModelOptions,
    *,
    codec: str | None,
    view_quality: int | None,
    region_quality: int | None,
    server: str | None,
    token: str | None,
) -> Method:
    """Create the method that the user chose.

    Raises:
        ConfigError: the name is unknown, or the method lacks one of the options.
    """
    chosen = None if codec is None else _codec(codec)
    if name not in (TWO_STAGE, HD):
        raise ConfigError(f"there is no method {name!r}; there are: {TWO_STAGE}, {HD}")
    if name == HD:
        if server is not None or region_quality is not None:
            raise ConfigError("the method hd takes neither --server nor --region-quality")
        from eval.runs.methods.hd import HighResolutionMethod

        return HighResolutionMethod(task, options, codec=chosen, view_quality=view_quality)
    if server is not None:
        if region_quality is not None:
            raise ConfigError(
                "with --server, the service decides how regions are encoded; "
                "leave out --region-quality"
            )
        if options != ModelOptions(name=options.name, overrides=options.overrides) or (
            options.overrides.keys() - {"max_new_tokens"}
        ):
            raise ConfigError(
                "with --server, the service sets the options of the model; leave them out"
            )
        from eval.runs.methods.over_service import OverService

        return OverService(
            task,
            server,
            token,
            codec=chosen,
            view_quality=view_quality,
            max_new_tokens=options.overrides.get("max_new_tokens"),
        )
    from eval.runs.methods.two_stage import TwoStage

    return TwoStage(
        task, options, codec=chosen, view_quality=view_quality, region_quality=region_quality
    )


def _codec(name: str) -> Codec:
    try:
        return Codec[name.upper()]
    except KeyError:
        raise ConfigError(f"there is no codec {name!r}; there are: jpeg, webp, png") from None


def _several(count: int, threads: int | None) -> None:
    """Run this command in several processes that divide the samples.

    Args:
        count: number of processes.
        threads: threads of each process; None for the environment's `OMP_NUM_THREADS`, or an equal
            share of the cores.

    Raises:
        CollabError: a process failed.
        KeyboardInterrupt: a signal stopped the processes.
    """
    arguments = _without_processes(sys.argv[1:])
    of_each = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    if threads is not None:
        of_each["OMP_NUM_THREADS"] = str(threads)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "edge_client.cli.main", *arguments],
            stdout=subprocess.DEVNULL,  # this process prints the result once all have ended
            env={
                **of_each,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
            },
        )
        for rank in range(count)
    ]

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM,)}
    codes: list[int] = []
    try:
        for child in children:
            codes.append(_wait(child))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if any(code == 130 for code in codes):
        raise KeyboardInterrupt
    if any(codes):
        failed = ", ".join(str(rank) for rank, code in enumerate(codes) if code)
        raise CollabError(f"process {failed} of {count} failed; the same command resumes the run")


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for a child process. Ctrl-C in a terminal reaches it too, so it ends by itself."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def _without_processes(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--processes":
            skip = True
        elif not argument.startswith("--processes="):
            kept.append(argument)
    return kept


def _print_result(path: Path, ended: RunCounts, share: Share, as_json: bool) -> None:
    """Print how the run ended; of several processes, the last one prints the result.

    Raises:
        CollabError: all samples failed, or some are missing and no other process runs.
    """
    from eval.analysis.run import open_run

    summary: dict[str, Any] = {"run": str(path), "samples": ended.rows, "failed": ended.failed}
    summary["complete"] = ended.complete
    if not ended.complete:
        progress = f"{ended.rows + ended.failed} of {ended.samples} samples are done"
        if share.world == 1:
            raise CollabError(f"{path} is incomplete: {progress}; the same command resumes it")
        line = f"{path}: process {share.rank} of {share.world} is done; {progress}"
        print(json.dumps(summary) if as_json else line)
        return
    if not ended.rows:
        raise CollabError(f"all {ended.failed} samples failed; {path}/failed.jsonl says why")
    run = open_run(path)
    first = sum(record.first_score for record in run.records) / ended.rows
    second = sum(record.second_score for record in run.records) / ended.rows
    if as_json:
        print(json.dumps({**summary, "first": first, "second": second}))
        return
    failed = f", {ended.failed} failed (see failed.jsonl)" if ended.failed else ""
    both = f"{first:.1%}" if run.method != TWO_STAGE else f"{first:.1%} first, {second:.1%} second"
    print(f"{path}: {ended.rows} samples{failed}; {both}")
    if note := run.provenance["model"].get("note"):
        print(f"note: {note}")
