"""`vlm-collab eval run` as a user calls it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import config

from edge_client.cli.main import main
from eval.analysis.records import Record
from eval.analysis.run import open_run
from eval.cli.main import app
from eval.cli.run import _without_processes
from eval.runs.folder import RunFolder
from eval.runs.progress import Progress
from eval.runs.provenance import _command
from server_plugin.models.presets import config_folder
from tests.support.pictures import photo, saved

TIMES = {"first_s", "look_s", "second_s", "edge_s"}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def rows(folder: Path) -> list[dict[str, object]]:
    records = [asdict(record) for record in open_run(folder).records]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in records]


def test_eval_is_a_group_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    points = importlib.metadata.entry_points(group="vlm_collab.commands")
    assert points["eval"].load() is app
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "run" in out
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    assert "--view-quality" in out


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    line = ("run", "--task", "signs", "--limit", "3", "--out", str(folder))
    options = ("--view-quality", "50", "--codec", "webp", "--ratios", "1.0,2.0")
    code, out, err = call(capsys, *line, *options, "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    run = open_run(folder)
    assert (summary["samples"], summary["failed"]) == (3, 0)
    assert summary["second"] == sum(record.second_score for record in run.records) / 3
    assert run.provenance["codec"] == {"view": ["webp", 50], "region": ["webp", 90]}
    assert run.preset.ratios == (1.0, 2.0)
    # For a complete run, the same command does nothing, and other settings are refused.
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    code, out, _ = call(capsys, *line, *options)
    assert code == 0
    assert "3 samples" in out
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    code, _, err = call(capsys, *line)
    assert code == 2
    assert err.startswith(f"vlm-collab: {folder} holds another run")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--task", "nothing"], "there is no task 'nothing'"),
        (["--task", "signs", "--codec", "gif"], "there is no codec 'gif'"),
        (["--task", "signs", "--method", "best"], "there is no method 'best'"),
        (["--task", "signs", "--ratios", "a,b"], "--ratios takes numbers"),
        (["--task", "signs", "--model", "demo", "--server", "ws://x"], "--model or --server"),
        (["--task", "signs", "--layer", "2", "--server", "ws://x"], "service sets the options"),
        (["--task", "signs", "--device", "cpu", "--server", "ws://x"], "service sets the options"),
        (["--task", "signs", "--region-quality", "9", "--server", "ws://x"], "service decides"),
        (["--task", "signs", "--method", "hd", "--region-quality", "9"], "hd takes neither"),
        (["--task", "signs", "--method", "hd", "--model", "fake"], "hd needs a model"),
        (["--task", "signs", "--limit", "0"], "--limit"),
        (["--task", "signs", "--layer", "77", "--limit", "1"], "layer 77 does not exist"),
        (["--task", "signs", "--device", "quantum", "--limit", "1"], "no device 'quantum'"),
        (["--task", "signs", "--server", "ws://127.0.0.1:1", "--limit", "1"], "127.0.0.1:1"),
    ],
)
def test_wrong_use_gets_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "run", *arguments, "--out", str(tmp_path / "run"))
    assert code in (1, 2, 4)
    assert line in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not list(tmp_path.glob("run/**/part-*"))


def test_an_interrupted_run_names_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Progress.add

    def interrupted(self: Progress, records: Sequence[Record], failed: int) -> None:
        add(self, records, failed)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "add", interrupted)
    line = ["run", "--task", "signs", "--limit", "9", "--batch", "1", "--out", str(tmp_path / "r")]
    code, out, err = call(capsys, *line)
    assert (code, out) == (130, "")
    assert f"finished samples are in {tmp_path / 'r'}" in err
    assert "Traceback" not in err
    assert 0 < len(open_run(tmp_path / "r").records) < 9
    assert not open_run(tmp_path / "r").complete


def test_progress_shows_accuracy_bytes_and_failures(tmp_path: Path) -> None:
    line = ["--task", "signs", "--limit", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["eval", "run", *line])
    records = open_run(tmp_path).records
    rows = [replace(r, view_bytes=1000, region_bytes=500) for r in records]
    folder = RunFolder(tmp_path / "another")
    with Progress(folder, range(4), others=False, shown=False) as progress:
        assert progress.text() == ""
        progress.add([replace(rows[0], first_score=0.0, second_score=1.0)], 1)
        assert progress.text() == "first 0.0%, second 100.0%, 1,500 B/sample, 1 failed"
        # A method without a second stage has no second accuracy.
        progress.add([replace(rows[1], first_score=1.0, second_score=math.nan)], 0)
        assert progress.text() == "first 50.0%, 1,500 B/sample, 1 failed"


def test_processes_divide_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--task", "signs", "--limit", "7", "--batch", "1"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert call(capsys, *line, "--out", str(alone))[0] == 0
    program = [sys.executable, "-m", "edge_client.cli.main", "eval", *line, "--out", str(shared)]
    # As many threads as this process has; by default, each process would have half of them.
    threads = ["--threads", str(open_run(alone).provenance["machine"]["threads"])]
    done = subprocess.run([*program, *threads, "--processes", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (printed,) = done.stdout.splitlines()
    assert printed.startswith(f"{shared}: 7 samples")
    assert rows(shared) == rows(alone)
    assert len(list(shared.glob("rows/*"))) == 2, "each process writes shards of its own"


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """The number of threads must stay the same, since it changes the rounding of sums."""
    program = [sys.executable, "-m", "edge_client.cli.main", "eval", "run", "--task", "signs"]
    program += ["--limit", "6", "--batch", "1", "--save-every", "1"]

    def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, "--out", str(folder), *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )

    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert run(alone, "--threads", "1").returncode == 0
    assert open_run(alone).provenance["machine"]["threads"] == 1
    # A run keeps the number of threads that it began with.
    shutil.copytree(alone, resumed)
    for shard in sorted(resumed.glob("rows/*"))[1:]:
        shard.unlink()
    assert len(open_run(resumed).records) == 2
    done = run(resumed, "--processes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(resumed) == rows(alone)
    done = run(resumed, "--threads", "2")
    assert done.returncode == 2
    assert "holds another run (threads is 1 there and 2 here)" in done.stderr


def test_a_run_that_ends_incomplete_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["run", "--task", "signs", "--limit", "4", "--batch", "1", "--save-every", "1"]
    line += ["--out", str(tmp_path / "r")]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = call(capsys, *line)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'r'}: process 1 of 2 is done; 2 of 4 samples are done\n"
    # A single process is responsible for all samples; here shards get lost meanwhile.
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    save = RunFolder.save

    def losing(self: RunFolder) -> None:
        save(self)
        for shard in sorted(self.path.glob("rows/*"))[1:]:
            shard.unlink()

    monkeypatch.setattr(RunFolder, "save", losing)
    code, out, err = call(capsys, *line)
    assert (code, out) == (1, "")
    assert err.endswith(
        f"{tmp_path / 'r'} is incomplete: 2 of 4 samples are done; the same command resumes it\n"
    )


@pytest.mark.slow
def test_a_failed_process_fails_the_command(tmp_path: Path) -> None:
    line = ["--task", "signs", "--limit", "2", "--layer", "77", "--out", str(tmp_path / "run")]
    program = [sys.executable, "-m", "edge_client.cli.main", "eval", "run", *line]
    done = subprocess.run([*program, "--processes", "2"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vlm-collab: process 0, 1 of 2 failed")


@pytest.mark.slow
def test_accelerate_starts_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--task", "signs", "--limit", "7", "--batch", "1"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert call(capsys, "run", *line, "--out", str(alone))[0] == 0
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    line += ["--threads", str(open_run(alone).provenance["machine"]["threads"])]
    done = subprocess.run(
        [*launch, *options, "-m", "eval.runs.loop", *line, "--out", str(shared)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(shared.glob("rows/*"))) == 2
    assert rows(shared) == rows(alone)


def test_commands_are_recorded_without_secrets_and_passed_on_without_processes() -> None:
    given = ["eval", "run", "--token", "s3cret", "--processes", "2", "--task", "signs"]
    assert _command(given)[3] == "..."
    assert _command(["--token=s3cret"]) == ["--token=..."]
    assert _command(["--server", "ws://here:1?token=s3cret"]) == ["--server", "ws://here:1"]
    assert _command(["--server=ws://here:1?token=s3cret"]) == ["--server=ws://here:1"]
    assert _without_processes(given) == [*given[:4], *given[6:]]
    assert _without_processes(["--processes=4", "run"]) == ["run"]


# --- presets ------------------------------------------------------------------------------------


@pytest.fixture
def textvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two questions in TextVQA's layout."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    picture = {"bytes": saved(photo(400, 300), "JPEG"), "path": ""}
    row = {"image_id": "a", "answers": ["stop"] * 10, "ocr_tokens": ["STOP"]}
    made = [
        {**row, "question_id": n, "question": f"what is sign {n}?", "image": picture}
        for n in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(made), path)
    return tmp_path / "hub"


def preset_file(folder: Path, **changed: object) -> Path:
    fields = yaml.safe_load((config_folder() / "models" / "demo.yaml").read_text(encoding="utf-8"))
    prompts = {**fields["prompts"], "short": "USER: <image>\n{question} Be short. ASSISTANT:"}
    path = folder / "mine.yaml"
    fields |= {"prompts": prompts, "instructed": ["short"], **changed}
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_a_template_that_says_how_to_answer_gets_no_post_prompt(
    textvqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = str(preset_file(tmp_path))
    line = ["run", "--task", "textvqa", "--data", str(textvqa), "--preset", mine]
    for number, (more, behind) in enumerate(
        (
            ((), "\nAnswer the question using a single word or phrase."),
            (("--prompt", "short"), ""),
            (("--prompt", "short", "--post-prompt", " Please."), " Please."),
        )
    ):
        out = tmp_path / f"run-{number}"
        code, _, err = call(capsys, *line, *more, "--out", str(out))
        assert code == 0, err
        run = open_run(out)
        assert [record.question for record in run.records] == [
            f"what is sign {n}?{behind}".replace("what", "What") for n in range(2)
        ]
        assert run.provenance["task"]["settings"]["post_prompt"] == behind
        assert run.preset.prompt == (more[1] if more else "chat")


def test_a_run_uses_the_given_preset_and_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = str(preset_file(tmp_path, eta=0.75, fit="crop")), tmp_path / "run"
    line = ("run", "--task", "signs", "--limit", "1", "--preset", mine, "--out")
    code, _, err = call(capsys, *line, str(out))
    assert (code, err.count("the fit is crop")) == (0, 1)
    assert (open_run(out).preset.eta, open_run(out).preset.fit) == (0.75, "crop")
    code, _, err = call(capsys, *line, str(tmp_path / "pad"), "--fit", "pad")
    assert (code, err) == (0, "")
    assert open_run(tmp_path / "pad").preset.fit == "pad"
    code, _, err = call(capsys, *line, str(out), "--fit", "pad")
    assert (code, "another run" in err) == (2, True)
    # LLaVA-1.5-HD opens its model by another function.
    code, _, err = call(capsys, *line, str(tmp_path / "hd"), "--fit", "pad", "--method", "hd")
    assert code == 0, err
    assert open_run(tmp_path / "hd").preset.fit == "pad"
