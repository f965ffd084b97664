"""Runs: contents of their rows, and the same rows when stopped, divided or repeated."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from edge_client.cli.main import main
from edge_client.picture import Picture
from eval.analysis.records import PROVENANCE, SHARDS, Record
from eval.analysis.run import open_run
from eval.runs.folder import FAILURES, RunFolder
from eval.runs.loading import ModelOptions
from eval.runs.loop import RunCounts, Share, StoppedError, run
from eval.runs.methods.two_stage import TwoStage
from eval.tasks import Sample, Task, open_task
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.open import open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.engines.two_stage import RegionNeed
from tests.support.pinned import PROJECTS
from tests.support.tiny_instructblip import save_tiny_instructblip
from tests.support.tiny_qwen import save_tiny_qwen
from vlm_collab.errors import CollabError, ConfigError
from vlm_collab.method.uncertainty import TokenStatistics
from vlm_collab.pictures.images import Codec, decode
from vlm_collab.protocol.messages import Retransmit

LIMIT = 13
BATCH = 2
TIMES = ("first_s", "look_s", "second_s", "edge_s")
STALLING = Path(__file__).parents[1] / "support" / "stalling_run.py"


class Changed(Task):
    """A task with some samples changed."""

    name = "signs"

    def __init__(self, task: Task, change: Callable[[int, Sample], Sample]) -> None:
        self._task, self._change = task, change
        self.split, self.max_new_tokens, self.stop = task.split, task.max_new_tokens, task.stop
        self.default_scorer, self.scorers = task.default_scorer, task.scorers
        self.settings = task.settings

    def __len__(self) -> int:
        return len(self._task)

    def __getitem__(self, index: int) -> Sample:
        return self._change(index, self._task[index])


@cache
def drawn(index: int) -> bytes:
    """A picture of the benchmark, generated once for all tests."""
    return open_task("signs", limit=LIMIT)[index].picture()


def signs() -> Task:
    """The task of `--task signs --limit LIMIT`, with cached pictures."""
    return Changed(
        open_task("signs", limit=LIMIT),
        lambda index, sample: replace(sample, picture=partial(drawn, index)),
    )


def make(folder: Path, task: Task | None = None, **options: Any) -> RunCounts:
    task = task or signs()
    shared = {name: options.pop(name) for name in ("view_quality", "codec") if name in options}
    method = TwoStage(task, ModelOptions(name="demo", batch=BATCH), **shared)
    options = {"share": Share(session="a"), "limit": LIMIT, "save_every": 1, **options}
    return asyncio.run(run(method, task, folder, **options))


def without_times(folder: Path) -> list[dict[str, Any]]:
    rows = [asdict(record) for record in open_run(folder).records]
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert make(folder) == RunCounts(LIMIT, 0, LIMIT)
    return folder


async def asked_alone(sample: Sample) -> dict[str, Any]:
    """The engine's results for a single question, and what its edge sends."""
    backend, preset = open_model("demo", device="cpu", dtype="float32", batch=1)
    engine = engine_of(backend, preset, None, {}, provisional=True)
    picture = Picture.open(sample.picture())
    info, sent = backend.info, b""

    async def fetch(need: RegionNeed) -> Image.Image:
        nonlocal sent
        sent = picture.region(need.box, engine.target, Codec.JPEG, preset.quality)
        return decode(sent, max_pixels=10**6)

    data = picture.view(info.view, info.fit, Codec.JPEG, preset.quality)
    view = await backend.open_view(decode(data, max_pixels=10**6))
    outcome = await engine.answer(
        view, picture.size, GenerationRequest(sample.question), fetch, retransmit=Retransmit.ALWAYS
    )
    await backend.close()
    assert outcome.second is not None
    assert outcome.need is not None
    steps: dict[str, tuple[TokenStatistics, ...]] = {
        "first": outcome.first.steps,
        "second": outcome.second.steps,
    }
    return {
        "first_text": outcome.first.text,
        "second_text": outcome.second.text,
        "first_tokens": list(outcome.first.token_ids),
        "second_tokens": list(outcome.second.token_ids),
        "box": list(outcome.need.box),
        "view_bytes": len(data),
        "region_bytes": len(sent),
        "original_bytes": len(sample.picture()),
        "mflops": outcome.work.flops / 1e6,
        "map": outcome.need.map.ravel().tolist(),
        "steps": steps,
    }


def test_a_row_equals_the_engine_s_results_for_a_single_question(unbroken: Path) -> None:
    task, records = signs(), open_run(unbroken).records
    for index in (0, 7, LIMIT - 1):
        record = records[index]
        alone = asyncio.run(asked_alone(task[index]))
        for name in ("first_text", "second_text", "first_tokens", "second_tokens", "box"):
            assert getattr(record, name) == alone[name]
        for name in ("view_bytes", "region_bytes", "original_bytes"):
            assert getattr(record, name) == alone[name]
        assert record.map == pytest.approx(alone["map"], rel=1e-4)
        assert (record.map_rows, record.map_columns) == (8, 8)
        for which, steps in alone["steps"].items():
            rows = zip(
                getattr(record, f"{which}_min_entropy"),
                getattr(record, f"{which}_entropy"),
                getattr(record, f"{which}_margin"),
                strict=True,
            )
            for mine, theirs in zip(rows, steps, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)
        spent = record.first_mflops + record.look_mflops + record.second_mflops
        assert spent == pytest.approx(alone["mflops"], abs=2)
        assert record.first_score == task.scorers[task.default_scorer](
            record.first_text, task[index].truth
        )


def test_questions_about_one_picture_each_cost_a_full_prefill(unbroken: Path) -> None:
    records = open_run(unbroken).records
    images = [record.image_id for record in records]
    assert len(set(images)) < len(images), "the benchmark asks several questions about a picture"
    for record in records:
        # The whole prompt is prefilled for each question, so no pass is free.
        assert min(record.first_mflops, record.look_mflops, record.second_mflops) > 0
    looks = {record.look_mflops for record in records}
    assert len(looks) == 1, "the generic instruction is the same for all"


def test_provenance_says_what_was_run(unbroken: Path) -> None:
    provenance = json.loads((unbroken / PROVENANCE).read_text())
    assert provenance["format"] == 1
    assert provenance["method"] == "two_stage"
    assert provenance["task"]["name"] == "signs"
    assert provenance["task"]["limit"] == LIMIT
    assert (provenance["samples"], provenance["failed"]) == (LIMIT, 0)
    assert provenance["codec"] == {"view": ["jpeg", 90], "region": ["jpeg", 90]}
    weights = Path("demo/vlm_collab_demo/demo_model/model.safetensors")
    digest = subprocess.run(["sha256sum", weights], capture_output=True, text=True, check=True)
    assert provenance["model"]["weights"] == digest.stdout.split()[0]
    assert provenance["model"]["preset"]["layer"] == 1
    assert provenance["finished"] >= provenance["started"]
    run = open_run(unbroken)
    assert run.decoder == (64, 192, 4)
    assert run.preset.eta == 0.25


def test_a_killed_run_resumes_to_the_same_rows(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(STALLING), str(folder), str(LIMIT), str(LIMIT - 2)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PROJECTS))},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    kept = sorted(folder.glob(SHARDS))
    assert kept, "nothing was saved before the kill"
    before = {path: path.read_bytes() for path in kept}
    assert 0 < len(open_run(folder).records) < LIMIT
    assert json.loads((folder / PROVENANCE).read_text())["finished"] is None

    assert make(folder) == RunCounts(LIMIT, 0, LIMIT)
    assert without_times(folder) == without_times(unbroken)
    assert {path: path.read_bytes() for path in kept} == before, "finished samples were run again"
    assert len(json.loads((folder / PROVENANCE).read_text())["resumed"]) == 1


def test_several_processes_make_the_rows_of_one(unbroken: Path, tmp_path: Path) -> None:
    # The last process marks the run as finished.
    first = make(tmp_path, share=Share(2, 3, "b"))
    assert not first.complete
    assert not make(tmp_path, share=Share(0, 3, "b")).complete
    assert json.loads((tmp_path / PROVENANCE).read_text())["finished"] is None
    assert make(tmp_path, share=Share(1, 3, "b")).complete
    assert without_times(tmp_path) == without_times(unbroken)
    provenance = json.loads((tmp_path / PROVENANCE).read_text())
    assert provenance["samples"] == LIMIT
    assert "resumed" not in provenance


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_sample_belongs_to_one_process(world: int, size: int) -> None:
    shares = [[*Share(rank, world).groups(23, size)] for rank in range(world)]
    assert sorted(i for groups in shares for group in groups for i in group) == list(range(23))
    for rank, groups in enumerate(shares):
        assert all(group.start // size % world == rank for group in groups)


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Share.of_this_process().rank, Share.of_this_process().world) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (Share.of_this_process().rank, Share.of_this_process().world) == (1, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match=r"RANK must be from 0 to 3 \(WORLD_SIZE - 1\), not 4"):
        Share.of_this_process()


def test_an_interrupted_run_can_be_resumed(unbroken: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(record: Record) -> None:
        seen.append(record.index)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        # With `save_every=1000`, only the interrupt saves rows.
        make(tmp_path, watch=watch, save_every=1000)
    kept = [record.index for record in open_run(tmp_path).records]
    assert kept == seen
    assert len(kept) < LIMIT
    assert make(tmp_path).complete
    assert without_times(tmp_path) == without_times(unbroken)


def broken(index: int, sample: Sample) -> Sample:
    if index == 3:
        return replace(sample, image_id="no picture", picture=lambda: b"this is no picture")
    if index == 5:
        data = sample.picture()
        return replace(sample, image_id="half", picture=lambda: data[: len(data) // 2])
    if index == 6:
        raise KeyError("answers")
    if index == 8:
        return replace(sample, question="why? " * 2000)
    return sample


def test_broken_samples_are_listed_and_do_not_end_the_run(unbroken: Path, tmp_path: Path) -> None:
    task = Changed(signs(), broken)
    assert make(tmp_path, task) == RunCounts(LIMIT - 4, 4, LIMIT)
    listed = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [one["index"] for one in listed] == [3, 5, 6, 8]
    assert "not a picture" in listed[0]["reason"] or "usable formats" in listed[0]["reason"]
    assert listed[2]["reason"] == "the sample: KeyError: 'answers'"
    assert "too long" in listed[3]["reason"]
    assert all("\n" not in one["reason"] for one in listed)
    rows = {row["index"]: row for row in without_times(tmp_path)}
    assert sorted(rows) == [i for i in range(LIMIT) if i not in (3, 5, 6, 8)]
    whole = {row["index"]: row["second_text"] for row in without_times(unbroken)}
    assert all(row["second_text"] == whole[index] for index, row in rows.items())
    provenance = json.loads((tmp_path / PROVENANCE).read_text())
    assert (provenance["samples"], provenance["failed"]) == (LIMIT - 4, 4)

    # Resuming tries the failed samples again, and neither repeats nor loses a row.
    assert make(tmp_path, task) == RunCounts(LIMIT - 4, 4, LIMIT)
    assert {row["index"]: row for row in without_times(tmp_path)} == rows
    listed_again = (tmp_path / FAILURES).read_text().splitlines()
    assert [json.loads(line) for line in listed_again] == listed
    # With good pictures, the run becomes complete.
    assert make(tmp_path) == RunCounts(LIMIT, 0, LIMIT)
    complete = {row["index"]: row for row in without_times(tmp_path)}
    assert {index: complete[index] for index in rows} == rows
    assert not (tmp_path / FAILURES).exists()


def test_a_run_ends_when_nothing_works(tmp_path: Path) -> None:
    def gone(index: int, sample: Sample) -> Sample:
        def read() -> bytes:
            raise OSError("the disk is gone")

        return replace(sample, image_id=str(index), picture=read)

    task = Changed(open_task("signs", limit=60), gone)
    with pytest.raises(CollabError, match=r"samples failed in a row.*the disk is gone"):
        make(tmp_path, task, limit=60)


def test_another_run_s_folder_is_refused(unbroken: Path) -> None:
    before = (unbroken / PROVENANCE).read_bytes()
    refused = (
        r"holds another run \(codec view is \[\"jpeg\", 90\] there and \[\"jpeg\", 40\] here\)"
    )
    with pytest.raises(ConfigError, match=refused):
        make(unbroken, view_quality=40)
    with pytest.raises(ConfigError, match="task limit is 13 there and 7 here"):
        make(unbroken, open_task("signs", limit=7), limit=7)
    with pytest.raises(ConfigError, match="already holds a run"):
        make(unbroken, share=Share(session="another"), resume=False)
    assert (unbroken / PROVENANCE).read_bytes() == before


def test_data_are_compared_without_their_folder(unbroken: Path, tmp_path: Path) -> None:
    def of(files: dict[str, int], **more: Any) -> Task:
        task = signs()
        task.settings = {**task.settings, "data": {"files": files, **more}}
        return task

    make(tmp_path, of({"data/test-0.parquet": 7}, folder="data/signs"))
    # The path from another working directory, and files named without their subfolder.
    for same in (of({"data/test-0.parquet": 7}, folder="/x/signs"), of({"test-0.parquet": 7})):
        assert make(tmp_path, same).complete
    with pytest.raises(ConfigError, match=r"files test-0.parquet is 7 there and 8 here"):
        make(tmp_path, of({"test-0.parquet": 8}))


# Locks a run's folder until it is killed. Arguments: folder, key, rank.
LOCKING = textwrap.dedent("""
    import sys
    from pathlib import Path
    from eval.runs.lock import session_lock
    with session_lock(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "its own"):
        print("locked", flush=True)
        sys.stdin.read()
""")


@contextmanager
def locked_elsewhere(folder: Path, key: str, rank: int = 0) -> Iterator[None]:
    """Another process holds the lock of the run's folder."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKING, str(folder), key, str(rank)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
        process.kill()


def test_sessions_exclude_each_other_but_not_their_own_processes(
    unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    line = "run: another session is working on this run"
    with locked_elsewhere(folder, Share(0, 2, "a").key):
        # Another session is refused, whatever its share of the samples.
        for other in (Share(0, 2, "b"), Share(1, 2, "b"), Share(0, 1, "a"), Share(2, 3, "a")):
            with pytest.raises(ConfigError, match=line):
                make(folder, share=other)
        # A second process of the same rank is refused; another rank of the session is not.
        with pytest.raises(ConfigError, match=line):
            make(folder, share=Share(0, 2, "a"))
        with locked_elsewhere(folder, Share(1, 2, "a").key, 1):
            pass
        assert make(folder, share=Share(1, 2, "a")).complete
    # The message has a hint for processes that were started one by one.
    with locked_elsewhere(folder, Share(0, 2, "a").key):
        with pytest.raises(ConfigError, match="set the same MASTER_ADDR and MASTER_PORT"):
            make(folder, share=Share(1, 2, "b"))
        with pytest.raises(ConfigError, match=f"{line}$"):
            make(folder, share=Share(0, 1, "b"))
    # A killed process frees its lock, and its files are removed.
    assert make(folder, share=Share(0, 3, "c")).complete
    assert without_times(folder) == without_times(unbroken)
    assert not list(folder.glob("process-*"))


def test_a_later_launch_with_the_same_name_is_another_session(
    unbroken: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    first, later = Share(0, 2, "p-1", "node-1-29500"), Share(0, 2, "p-2", "node-1-29500")
    make(folder, share=first)
    shutil.copytree(folder, other)
    with pytest.raises(ConfigError, match="already holds a run"):
        make(folder, share=later, resume=False)
    make(folder, share=later)
    provenance = json.loads((folder / PROVENANCE).read_text())
    assert [provenance["session"], *(one["session"] for one in provenance["resumed"])] == [
        "p-1",
        "p-2",
    ]
    # A process joins the session of a launch that is still running. A process whose parent began
    # the run belongs to that session at any time.
    with locked_elsewhere(other, later.key, 1):
        with pytest.raises(ConfigError, match="already holds a run"):
            make(other, share=later, resume=False)
        provenance = json.loads((other / PROVENANCE).read_text()) | {"session": "its own"}
        (other / PROVENANCE).write_text(json.dumps(provenance))
        make(other, share=later, resume=False)
    make(other, share=Share(1, 2, "its own", "node-1-29500"), resume=False)
    assert "resumed" not in json.loads((other / PROVENANCE).read_text())
    assert without_times(other) == without_times(unbroken)
    assert not list(other.glob("process-*"))


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ConfigError, match=r"run: its file system has no locks \(FileSystem does"):
        make(tmp_path / "run")


def test_processes_of_one_launch_are_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def sessions() -> set[str]:
        """Keys of processes with different parents, as on several machines."""
        keys = set()
        for rank, parent in enumerate((os.getpid(), os.getppid())):
            monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
            monkeypatch.setenv("RANK", str(rank))
            keys.add(Share.of_this_process().key)
        return keys

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert len(sessions()) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert sessions() == {"none-node-1-29500/2"}
    # If one launcher started all processes here, its process id tells launches apart, even if
    # their environment variables are the same.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert len(sessions()) == 2


def test_a_shard_never_overwrites_another(unbroken: Path, tmp_path: Path) -> None:
    # Without locks, two sessions may write shards that begin with the same sample.
    records = list(open_run(unbroken).records)
    provenance = json.loads((unbroken / PROVENANCE).read_text()) | {"finished": None}
    one, two = (RunFolder.begin(tmp_path, provenance, resume=True) for _ in range(2))
    one.add(records[4:12], [])
    one.save()
    two.add(records[4:6], [])
    two.save()
    assert len(list(tmp_path.glob(SHARDS))) == 2
    assert list(open_run(tmp_path).records) == records[4:12]
    assert not list(tmp_path.rglob("*.writing"))


def test_any_tool_that_reads_parquet_reads_a_run(unbroken: Path, tmp_path: Path) -> None:
    """The line of docs/evaluation.md reads a run whose folder holds all kinds of files."""
    page = Path("docs/evaluation.md").read_text()
    (line,) = re.findall(r"```python\nimport pandas\n\nrows = (.*)\n```", page)
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert main_sweep(folder) == 0
    (folder / "failed.jsonl").touch()
    for name in ("looking.lock", "rows/.part-00000000-01234567.writing"):
        (folder / name).touch()
    read = re.sub(r"runs/[\w-]+", str(folder), line)
    assert str(folder) in read
    rows = eval(read, {"pandas": pandas})
    assert sorted(rows["index"]) == list(range(LIMIT))
    records = {record.index: record for record in open_run(unbroken).records}
    assert all(records[row.index].question == row.question for row in rows.itertuples(index=False))
    assert pq.read_table(folder / "rows").num_rows == LIMIT


def main_sweep(folder: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "sweep", str(folder)])
    return int(ended.value.code or 0)


def test_a_run_of_an_earlier_version_is_read_and_resumed(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    for shard in sorted(folder.glob(SHARDS)):
        shard.rename(folder / shard.name)
    (folder / "rows").rmdir()
    assert without_times(folder) == without_times(unbroken)
    max(folder.glob("part-*")).unlink()
    kept = len(list(folder.glob("part-*")))
    assert 0 < len(open_run(folder).records) < LIMIT
    assert make(folder) == RunCounts(LIMIT, 0, LIMIT)
    assert without_times(folder) == without_times(unbroken)
    assert len(list(folder.glob("part-*"))) == kept


def test_a_damaged_shard_is_named(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    shard = min((tmp_path / "run").glob(SHARDS))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"part-00000000.parquet is damaged .* delete it"):
        make(tmp_path / "run")
    shard.unlink()
    assert make(tmp_path / "run").complete
    assert without_times(tmp_path / "run") == without_times(unbroken)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text("[]")
    with pytest.raises(ConfigError, match="does not describe a run"):
        make(tmp_path)
    with pytest.raises(ConfigError, match="holds no run with samples"):
        open_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", r"run\.json does not describe a run: Expected `object`, got `array`"),
        ("{}", r"run\.json does not describe a run: Object missing required field `method`"),
        ('{"method": "two_stage", "task": {}, "model": {}}', r"field `name` - at `\$.task`"),
        ("{", r"cannot be read as a run"),
    ],
)
def test_a_damaged_run_gets_one_line(unbroken: Path, tmp_path: Path, text: str, line: str) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / PROVENANCE).write_text(text)
    with pytest.raises(ConfigError, match=line) as error:
        open_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_shard_of_something_else_gets_one_line(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    shard = min((tmp_path / "run").glob(SHARDS))
    pq.write_table(pq.read_table(shard).drop_columns("first_text"), shard)
    with pytest.raises(ConfigError, match=r"cannot be read as a run.*first_text"):
        open_run(tmp_path / "run")


def test_the_model_sees_the_decoded_view(unbroken: Path, tmp_path: Path) -> None:
    make(tmp_path, view_quality=5)
    for rough, fine in zip(without_times(tmp_path), without_times(unbroken), strict=True):
        assert rough["view_bytes"] < fine["view_bytes"]
        assert rough["reference_bytes"] == fine["reference_bytes"]
        assert rough["first_min_entropy"] != fine["first_min_entropy"]
    assert {row["view_pixels"] for row in without_times(tmp_path)} == {112 * 112}


@pytest.mark.parametrize(
    "save", [save_tiny_qwen, save_tiny_instructblip], ids=["qwen2.5-vl", "instructblip"]
)
def test_other_families_run_and_repeat(save: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, task = save(tmp_path / "model"), open_task("signs", limit=3)
    options = ModelOptions(name=str(folder), batch=2, overrides={"layer": 1, "max_new_tokens": 4})
    for name in ("one", "two"):
        work = run(TwoStage(task, options), task, tmp_path / name, share=Share(session="a"))
        assert asyncio.run(work) == RunCounts(3, 0, 3)
    assert without_times(tmp_path / "one") == without_times(tmp_path / "two")
    opened = open_run(tmp_path / "one")
    for record in opened.records:
        assert [record.map_rows, record.map_columns] == opened.provenance["model"]["grid"]
        assert len(record.first_tokens) == len(record.first_margin) > 0
        assert min(record.first_mflops, record.look_mflops, record.second_mflops) > 0
