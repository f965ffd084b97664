"""The whole report on the demo model, from scratch: ``python -m eval.report.demo``.

Calls the same commands as a user for runs, layers, threshold and report. Thresholds and layers come
from the split `val`; `test` is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.analysis.records import PROVENANCE, SCHEMA, SHARDS, read_records, shards_of
from eval.report.tables import calibrate_command
from vlm_collab.cli.quiet import silence_libraries

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results" / "demo"
QUALITIES = (5, 15, 30, 50, 75)
SAMPLES, SAMPLES_OF_QUALITIES, SAMPLES_OF_LAYERS = 1000, 400, 300


def commands(samples: int, of_qualities: int, of_layers: int) -> list[list[str]]:
    """Arguments of the commands before the report, in order, to be called in its folder."""
    run = ["eval", "run", "--task", "signs", "--split"]
    count = str(samples)
    result = [
        [*run, "test", "--limit", count, "--out", "runs/test"],
        [*run, "val", "--limit", count, "--out", "runs/val"],
        [*run, "test", "--limit", count, "--method", "hd", "--out", "runs/hd"],
    ]
    for quality in QUALITIES:
        both = ["--view-quality", str(quality), "--region-quality", str(quality)]
        count = str(of_qualities)
        result.append([*run, "test", "--limit", count, *both, "--out", f"runs/jpeg-{quality}"])
    layers = ["--task", "signs", "--split", "val", "--limit", str(of_layers)]
    result.append(["calibrate", "layers", *layers, "--out", "layers.yaml"])
    result.append(calibrate_command("runs/val"))
    return result


def report_command() -> list[str]:
    """Arguments of the last command, which writes the report."""
    runs = ["runs/test", "runs/hd", *(f"runs/jpeg-{quality}" for quality in QUALITIES)]
    return ["eval", "report", *runs, "--val", "runs/val", "--layers", "layers.yaml", "--out", "."]


def pack(folder: Path) -> None:
    """Rewrite a finished run's rows as one small shard, for the repository.

    Maps are rounded to single precision, in which the attention was computed. They are most of a
    run's size, and no figure depends on them.
    """
    shards = shards_of(folder)
    rows = [
        asdict(replace(record, map=np.asarray(record.map, np.float32).tolist()))
        for record in read_records(folder)
    ]
    whole = folder / "whole.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        whole,
        compression="zstd",
        compression_level=19,
        # Stores bytes of equal significance together; those that rounding made zero compress well.
        use_dictionary=False,
        use_byte_stream_split=["map.list.element"],
    )
    for left in (*shards, *folder.glob("*.lock")):
        left.unlink()
    shard = folder / SHARDS.replace("*", f"{rows[0]['index']:08d}")
    shard.parent.mkdir(exist_ok=True)
    whole.rename(shard)
    # The path of this checkout is of no use to readers.
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    provenance["command"][0] = "vlm-collab"
    text = json.dumps(provenance, indent=1, ensure_ascii=False)
    (folder / PROVENANCE).write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    silence_libraries()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/report"))
    parser.add_argument("--against", type=Path, default=COMMITTED / "report.json")
    parser.add_argument("--processes", type=int, default=2, help="for each run")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--samples-of-qualities", type=int, default=SAMPLES_OF_QUALITIES)
    parser.add_argument("--samples-of-layers", type=int, default=SAMPLES_OF_LAYERS)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for command in commands(
        options.samples, options.samples_of_qualities, options.samples_of_layers
    ):
        more = ["--processes", str(options.processes)] if command[:2] == ["eval", "run"] else []
        _call([*command, *more], out)
        if more:
            pack(out / command[-1])
    against = ["--against", str(options.against.resolve())] if options.against.exists() else []
    _call([*report_command(), *against], out)


def _call(command: list[str], folder: Path) -> None:
    print(f"$ vlm-collab {' '.join(command)}", file=sys.stderr, flush=True)
    # Use this repository's code, whatever the working folder.
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    # One thread per process, so that rounding does not depend on the number of cores.
    called = subprocess.run(
        [sys.executable, "-m", "edge_client.cli.main", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if called.returncode:
        sys.exit(called.returncode)


if __name__ == "__main__":
    main()
