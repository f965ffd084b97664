"""Write a report: figures, tables, a JSON file with all data and their origin, and a page."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.figure import Figure

from eval.analysis.run import Run
from eval.analysis.separation import BINS
from eval.analysis.trace import provenance_of
from eval.report import figures
from eval.report.findings import findings
from eval.report.histograms import draw_fig7, fig7
from eval.report.inputs import Inputs
from eval.report.panels import draw_panels
from eval.report.pictures import draw_fig11, fig11
from eval.report.style import save
from eval.report.table_format import csv_text, markdown
from eval.report.table_list import TABLES
from eval.report.tables import calibrate_command, chosen_notes
from eval.tasks import Task, open_task
from vlm_collab.errors import CollabError, ConfigError

RESULTS = "report.json"
FORMATS = ("png", "pdf")

_FIGURES: dict[str, tuple[Callable[[Inputs], dict[str, Any] | None], str]] = {
    "fig-04-communication": (
        figures.fig4,
        "Band: 95 % of resamples, at each cost separately. Dotted: regions of randomly chosen "
        "questions. η from val: the threshold that `calibrate` chose on the validation split. It "
        "is chosen for that mixture of questions, not for each kind of question; the text above "
        "the table of chosen thresholds states its other limits.",
    ),
    "fig-05-computation": (
        figures.fig5,
        "Marks and the dotted line by Eq. 17-20; the engine shares what the three prompts have in "
        "common, so it spends less. η from val: as in Fig. 4.",
    ),
    "fig-06-metrics": (figures.fig6, "Areas and their differences are in the table below."),
    "fig-07-separation": (
        fig7,
        f"Bars: 95 % of resamples. {BINS} bins of equal width up to the largest value; a first "
        "answer is right if it scores at least one half.",
    ),
    "fig-08-aggregation": (
        figures.fig8,
        "Averages over more tokens than any answer has are left out.",
    ),
    "fig-09-tasks": (
        figures.fig9,
        "The paper has a panel for each of A-OKVQA, VQAv2 and GQA; a report on one benchmark has a "
        "panel for each kind of question.",
    ),
    "fig-10-models": (figures.fig10, "The models whose runs were given."),
    "fig-11-pictures": (
        fig11,
        "Chosen by a rule, not by hand, from the run of the lowest quality:",
    ),
    "fig-12-qualities": (
        figures.fig12,
        "Views and regions have the same quality. Each curve runs from no region sent to all.",
    ),
}


def write_report(
    inputs: Inputs,
    folder: Path,
    *,
    formats: Sequence[str] = FORMATS,
    data: Path | None = None,
    command: Sequence[str] = (),
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Write a report. The same runs give the same files, bit by bit.

    Args:
        inputs: see `sort_runs`.
        folder: created if it is missing.
        formats: file formats of figures, some of `FORMATS`.
        data: folder with the benchmark's data, for Fig. 11.
        command: the command that reproduces the report.
        progress: called with the name of each figure and table before it is made.

    Returns:
        Contents of `report.json`.

    Raises:
        ConfigError: two runs have the same name, or the folder cannot be written.
    """
    names = [run.folder.name for run in inputs.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs have the same folder name; rename one: {', '.join(names)}")
    results = {
        "format": 1,
        "command": list(command),
        "settings": {
            "scorer": inputs.main.provenance["task"]["scorer"],
            "resamples": inputs.resamples,
            "seed": inputs.seed,
            "confidence": 0.95,
            "clustered_by": "image_id",
            "bins": BINS,
        },
        "runs": {run.folder.name: provenance_of(run) for run in inputs.sources},
        "reported": inputs.main.folder.name,
        "val": None if inputs.val is None else inputs.val.folder.name,
        "layers": None if inputs.layers is None else msgspec.to_builtins(inputs.layers),
        "figures": {},
        "tables": {},
        "left_out": {},
        "notes": list(inputs.notes),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _figures(results, inputs, folder, formats, data, progress)
        _tables(results, inputs, folder, progress)
        (folder / RESULTS).write_text(as_json(results) + "\n", encoding="utf-8")
        (folder / "index.md").write_text(_page(results, inputs, formats), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return results


def draw(name: str, content: dict[str, Any], inputs: Inputs, data: Path | None = None) -> Figure:
    """Draw a figure from its entry in `report.json`; Fig. 11 needs its run and picture too.

    Raises:
        ConfigError: the picture is missing, or differs from the run's.
    """
    if name == "fig-07-separation":
        return draw_fig7(content)
    if name == "fig-11-pictures":
        run = next(one for one in inputs.runs if one.folder.name == content["rows"]["run"])
        return draw_fig11(content, run, _task_of(run, data))
    return draw_panels(content)


def _figures(
    results: dict[str, Any],
    inputs: Inputs,
    folder: Path,
    formats: Sequence[str],
    data: Path | None,
    progress: Callable[[str], None],
) -> None:
    for name, (make, _) in _FIGURES.items():
        progress(name)
        content = make(inputs)
        if content is None:
            results["left_out"][name] = "there is no run for it"
            continue
        try:
            figure = draw(name, content, inputs, data)
        except CollabError as error:
            if name != "fig-11-pictures":
                raise
            results["left_out"][name] = str(error)
            continue
        for kind in formats:
            save(figure, folder / f"{name}.{kind}")
        results["figures"][name] = {"made_by": f"{make.__module__}.{make.__name__}", **content}


def _tables(
    results: dict[str, Any], inputs: Inputs, folder: Path, progress: Callable[[str], None]
) -> None:
    for name, (title, make, formula, cells) in TABLES.items():
        progress(name)
        rows = make(inputs)
        if not rows:
            results["left_out"][name] = "there is no run for it"
            continue
        if name == "chosen":
            formula = f"{formula} {chosen_notes(inputs, rows)}"
        (folder / f"{name}.csv").write_text(csv_text(rows), encoding="utf-8")
        text = f"# {title}\n\n{formula}\n\n{markdown(rows, cells)}"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        made_by = f"{make.__module__}.{make.__name__}"
        results["tables"][name] = {"made_by": made_by, "formula": formula, "rows": rows}


def _task_of(run: Run, data: Path | None) -> Task:
    task = run.provenance["task"]
    return open_task(
        task["name"],
        data=data,
        split=task["split"],
        ocr=bool((task.get("settings") or {}).get("ocr")),
        limit=task.get("samples"),
    )


def _page(results: dict[str, Any], inputs: Inputs, formats: Sequence[str]) -> str:
    main = inputs.main.provenance
    task, model = main["task"], main["model"]
    lines = [
        f"# {model['name']} on {task['name']}, {task['split']} split",
        "",
        f"{len(inputs.main.records)} questions, scored by `{task['scorer']}`. Figures and tables "
        "are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language "
        "Models* (2025, arXiv 2512.16349), drawn from the runs below. Intervals are 95 % of "
        f"{inputs.resamples} resamples of whole pictures. Every number is in `{RESULTS}`, with the "
        "run and the rows (column `index`) that it comes from.",
    ]
    for note in (*(run.gaps for run in inputs.sources), *inputs.notes):
        lines += ["", f"**{note}.**"] if note else []
    if model["name"] == "demo":
        lines += [
            "",
            "This is the demo model on the generated benchmark: it shows the system at work, and "
            "says nothing about the paper's models and data sets.",
        ]
    lines += ["", "## What it shows", "", *(f"- {one}" for one in findings(results["tables"]))]
    lines += ["", "## Figures", ""]
    for name, (_, caption) in _FIGURES.items():
        if name not in results["figures"]:
            continue
        title = results["figures"][name]["title"]
        lines += [f"### {title}", ""]
        if "png" in formats:
            lines += [f"![{title}]({name}.png)", ""]
        notes = {
            one["note"]
            for panel in results["figures"][name].get("panels", ())
            for one in panel["marks"]
            if "note" in one
        }
        rule = results["figures"][name].get("rule")
        parts = [caption] if rule is None else [caption, f"{rule}."]
        lines += [" ".join([*parts, *(f"HD: {note}." for note in sorted(notes))]), ""]
    lines += ["## Tables", ""]
    for name, (title, _, _, cells) in TABLES.items():
        if name in results["tables"]:
            table = results["tables"][name]
            lines += [f"### {title}", "", table["formula"], "", markdown(table["rows"], cells)]
    if results["left_out"]:
        lines += ["## Left out", ""]
        lines += [f"- {name}: {why}" for name, why in results["left_out"].items()] + [""]
    threads = {(run.provenance.get("machine") or {}).get("threads") for run in inputs.sources}
    known = len(threads) == 1 and None not in threads
    each = f"Each run, with `--threads {threads.pop()}`:" if known else "Each run:"
    lines += ["## Commands", "", each, ""]
    lines += [f"    {_called(run)}" for run in results["runs"].values()]
    if results["layers"] is not None and "command" in results["layers"]["made"]:
        lines += ["", "The layers:", "", f"    {shlex.join(results['layers']['made']['command'])}"]
    if "--val" in results["command"]:
        val, scorer = (_option(results["command"], name) for name in ("--val", "--scorer"))
        assert val is not None
        called = shlex.join(["vlm-collab", *calibrate_command(val, scorer)])
        lines += ["", "The threshold with a guarantee, as a file for `serve`:", "", f"    {called}"]
    if results["command"]:
        lines += ["", "The report, in this folder:", "", f"    {shlex.join(results['command'])}"]
    return "\n".join(lines) + "\n"


def _option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def _called(run: dict[str, Any]) -> str:
    command = [str(one) for one in run.get("command") or []]
    return shlex.join(["vlm-collab", *command[1:]]) if command else "unknown"


def relative_path(folder: Path, path: Path) -> str:
    """The path, relative to a folder."""
    return os.path.relpath(path, folder)


def as_json(value: Any, indent: str = "") -> str:
    """Encode as indented JSON, with each list of plain values on one line.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [
            f"{deeper}{json.dumps(str(key), ensure_ascii=False)}: {as_json(one, deeper)}"
            for key, one in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list) for one in value):
        rows = [f"{deeper}{as_json(one, deeper)}" for one in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
