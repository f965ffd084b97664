"""lmms-eval's own command with the plugin, offline, compared with `vlm-collab eval`.

Its exit code is 0 even if a task fails, so these tests check the results file.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value, config

from eval.analysis.records import Record
from eval.analysis.run import open_run
from eval.runs.loading import ModelOptions
from eval.runs.loop import Share, run
from eval.runs.methods.two_stage import TwoStage
from eval.signs.build import build
from eval.tasks import Sample, Task, open_task
from server_plugin.models.presets import preset_named
from tests.support import lmms_env
from tests.support.process import serving
from vlm_collab.method.policy import Decision, ThresholdPolicy, TokenStatistics

pytestmark = [pytest.mark.lmms, pytest.mark.xdist_group("lmms")]

COUNT = 10
NO_PROMPT = {"default": {"pre_prompt": "", "post_prompt": "", "ocr": False}}
TABLE = Path(__file__).with_name("lmms_eval_0_7_3.json")
DOCUMENT = lmms_env.ROOT / "docs" / "lmms-eval.md"


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    lmms_env.ensure()


@dataclass(frozen=True)
class Data:
    """Rows of generated signs in the layout of the hub, and lmms-eval's tasks on them.

    Attributes:
        folder: contains a folder for each benchmark, and the tasks in `tasks`.
    """

    folder: Path

    def ours(self, name: str) -> Task:
        """The same rows as a task of this project."""
        if name == "signs":
            return open_task(name, data=self.folder / "data" / name)
        return open_task(name, data=self.folder / name, post_prompt="")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("lmms")
    signs = open_task("signs", limit=80)
    samples = [signs[index] for index in range(len(signs))]
    presence = [sample for sample in samples if sample.truth.answers[0] in ("yes", "no")]
    own = lmms_env.tasks()
    textvqa = [
        {
            "question_id": index,
            "image_id": sample.image_id,
            "question": sample.question,
            "answers": [*sample.truth.answers] * 8 + ["7", "no"],
            "ocr_tokens": ["STOP"],
            "image": _picture(sample),
        }
        for index, sample in enumerate(samples[:COUNT])
    ]
    pope = [
        {
            "question_id": str(index),
            "question": sample.question,
            "answer": sample.truth.answers[0],
            "image_source": sample.image_id,
            "category": "random",
            "image": _picture(sample),
        }
        for index, sample in enumerate(presence[:COUNT])
    ]
    pairs = [
        {"question": one.question, "answer": "7", "images": [_picture(one), _picture(other)]}
        for one, other in zip(samples[:2], samples[5:7], strict=True)
    ]
    _write(
        folder / "textvqa" / "data" / "validation-00000-of-00001.parquet",
        textvqa,
        answers=List(Value("string")),
        ocr_tokens=List(Value("string")),
    )
    _write(folder / "pope" / "data" / "test-00000-of-00001.parquet", pope)
    _write(folder / "pairs" / "data" / "test.parquet", pairs, images=List(Image()))
    _task(folder, "textvqa", "validation", include=str(own / "textvqa" / "textvqa_val.yaml"))
    _task(folder, "pope", "test", include=str(own / "pope" / "pope.yaml"))
    _task(
        folder,
        "pairs",
        "test",
        test_split="test",
        output_type="generate_until",
        doc_to_visual="images",
        doc_to_text="<image>\n<image>\n{{question}}",
        doc_to_target="answer",
        generation_kwargs={"max_new_tokens": 8, "top_k": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    # The documentation's example, unchanged.
    example = DOCUMENT.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (folder / "tasks" / "signs.yaml").write_text(example, encoding="utf-8")
    build(folder / "data" / "signs", "test", COUNT)
    return Data(folder)


def _picture(sample: Sample) -> dict[str, Any]:
    return {"bytes": sample.picture(), "path": f"{sample.image_id}.jpg"}


def _write(path: Path, rows: Sequence[Mapping[str, Any]], **kinds: Any) -> None:
    plain = {str: Value("string"), int: Value("int64")}
    features = {
        name: kinds.get(name) or (Image() if name == "image" else plain[type(value)])
        for name, value in rows[0].items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([*rows], features=Features(features)).to_parquet(path)


def _task(folder: Path, name: str, split: str, **fields: Any) -> None:
    """A task of lmms-eval on local rows."""
    (file,) = (folder / name / "data").glob("*.parquet")
    fields |= {
        "task": f"{name}_here",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {split: str(file)}},
        "lmms_eval_specific_kwargs": NO_PROMPT,
    }
    path = folder / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")


@dataclass(frozen=True)
class LmmsRun:
    """Outcome of a run of lmms-eval.

    Attributes:
        process: the finished process with its output.
        results: contents of the results file.
        samples: logged samples by task, in their order.
        log: the plugin's own lines by task.
    """

    process: subprocess.CompletedProcess[str]
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    log: Mapping[str, Sequence[Mapping[str, Any]]]

    def answers(self, task: str) -> list[str]:
        return [sample["filtered_resps"] for sample in self.samples[task]]

    def score(self, task: str, metric: str) -> float:
        return float(self.results["results"][task][f"{metric},none"])


Evaluate = Callable[..., LmmsRun]


@pytest.fixture(scope="module")
def evaluate(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """`python -m lmms_eval --model vlm_collab …`."""

    def run_it(*arguments: str, tasks: str, model_args: str = "") -> LmmsRun:
        out = tmp_path_factory.mktemp("out")
        log = out / "log.jsonl"
        process = lmms_env.python(
            *("-m", "lmms_eval", "--model", "vlm_collab", "--tasks", tasks),
            *("--model_args", f"{model_args},log={log}".lstrip(",")),
            *("--include_path", str(data.folder / "tasks")),
            *("--output_path", str(out), "--log_samples", *arguments),
            home=data.folder / "home",
        )
        output = process.stdout + process.stderr
        (results,) = list(out.rglob("*_results.json")) or [None]
        assert results is not None, output[-3000:]
        samples = {
            str(path.stem).partition("_samples_")[2]: _lines(path)
            for path in out.rglob("*_samples_*.jsonl")
        }
        lines = _lines(log)
        by_task = {name: [one for one in lines if one["task"] == name] for name in samples}
        return LmmsRun(process, json.loads(results.read_text()), samples, by_task)

    return run_it


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def ours(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[Record]]:
    """Both passes of the same rows by `vlm-collab eval`."""
    kept, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, str(data.folder / "cache")
    records = {}
    try:
        for name in ("textvqa", "pope", "signs"):
            folder, task = tmp_path_factory.mktemp(name), data.ours(name)
            method = TwoStage(task, ModelOptions(name="demo"))
            asyncio.run(run(method, task, folder, share=Share(session="a")))
            records[name] = open_run(folder).records
    finally:
        config.HF_DATASETS_CACHE = kept
    return records


@pytest.fixture(scope="module")
def here(evaluate: Evaluate) -> LmmsRun:
    """A run in one process, with the preset's policy."""
    tasks = "textvqa_here,pope_here,pairs_here,signs"
    return evaluate(tasks=tasks, model_args="pretrained=demo")


@pytest.fixture(scope="module")
def there(evaluate: Evaluate) -> LmmsRun:
    """A run over a service, always with a second pass."""
    # A service limits the answer's length, whatever a task asks for.
    with serving("--max-new-tokens", "128") as (_, ready):
        return evaluate(
            tasks="textvqa_here,pope_here,pairs_here",
            model_args=f"server={ready['url']},policy=always,concurrency=4",
        )


def _decided(record: Record, policy: ThresholdPolicy) -> Decision:
    columns = (record.first_min_entropy, record.first_entropy, record.first_margin)
    steps = [TokenStatistics(*step) for step in zip(*columns, strict=True)]
    return policy.decide(steps, ended=record.first_ended)


# --- against `vlm-collab eval` -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["textvqa", "pope", "signs"])
def test_in_process_it_answers_as_vlm_collab_eval(
    name: str, here: LmmsRun, ours: Mapping[str, Sequence[Record]]
) -> None:
    policy, task = preset_named("demo").policy(), name if name == "signs" else f"{name}_here"
    records, lines = ours[name], here.log[task]
    decisions = [_decided(record, policy) for record in records]
    unsure = [decision.retransmit for decision in decisions]
    assert len(records) == len(lines) == COUNT
    assert [one["stage"] == "second" for one in lines] == unsure
    # The groups are the same, so the numbers are equal bit by bit.
    assert [one["first_uncertainty"] for one in lines] == [one.value for one in decisions]
    texts = [r.second_text if u else r.first_text for r, u in zip(records, unsure, strict=True)]
    assert here.answers(task) == [one["text"] for one in lines] == texts
    for record, line, second in zip(records, lines, unsure, strict=True):
        assert line["view_bytes"] == record.view_bytes
        assert line["original_bytes"] == record.original_bytes
        assert line["own_files"] is True
        assert line["region_bytes"] == (record.region_bytes if second else 0)
        assert line["box"] == (record.box if second else None)


def test_the_run_had_both_stages(here: LmmsRun) -> None:
    stages = {one["stage"] for lines in here.log.values() for one in lines}
    assert stages == {"first", "second"}


@pytest.mark.parametrize("name", ["textvqa", "pope"])
def test_over_a_service_it_answers_as_vlm_collab_eval(
    name: str, there: LmmsRun, ours: Mapping[str, Sequence[Record]]
) -> None:
    lines = there.log[f"{name}_here"]
    assert there.answers(f"{name}_here") == [record.second_text for record in ours[name]]
    for record, line in zip(ours[name], lines, strict=True):
        assert (line["stage"], line["fallback"]) == ("second", "none")
        assert line["first_text"] == record.first_text
        assert (line["view_bytes"], line["region_bytes"]) == (
            record.view_bytes,
            record.region_bytes,
        )
        assert line["box"] == record.box
        # Question numbers get longer; options (a stop text, the longest answer) are sent too.
        plain = record.ask_bytes + record.reply_bytes + record.view_bytes + record.region_bytes
        assert 0 < line["bytes_up"] - plain < 64


@pytest.mark.parametrize("way", ["here", "there"])
def test_lmms_eval_and_this_project_score_alike(
    way: str, data: Data, request: pytest.FixtureRequest
) -> None:
    ended: LmmsRun = request.getfixturevalue(way)
    textvqa, pope = data.ours("textvqa"), data.ours("pope")
    answers = ended.answers("textvqa_here")
    score = textvqa.scorers["vqa"]
    scores = [score(text, one.truth) for text, one in zip(answers, textvqa, strict=True)]
    mean = sum(scores) / COUNT
    assert ended.score("textvqa_here", "exact_match") == pytest.approx(mean, abs=1e-12)
    figures = pope.summaries["pope"](ended.answers("pope_here"), [one.truth for one in pope])
    for theirs, mine in (("accuracy", "accuracy"), ("f1_score", "f1"), ("recall", "recall")):
        found = ended.score("pope_here", f"pope_{theirs}")
        assert found == pytest.approx(figures[mine], abs=1e-12)
    assert mean > 0
    assert figures["accuracy"] > 0


def test_the_documented_task_is_scored_alike(data: Data, here: LmmsRun) -> None:
    signs = data.ours("signs")
    score = signs.scorers["exact"]
    answers = here.answers("signs")
    mean = sum(score(text, one.truth) for text, one in zip(answers, signs, strict=True)) / COUNT
    assert 0 < here.score("signs", "exact_match") == pytest.approx(mean)


def test_lmms_eval_still_makes_the_committed_table(tmp_path: Path) -> None:
    made = tmp_path / "table.json"
    done = lmms_env.python("-m", "eval.tasks.against_lmms_eval", str(made), home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(made.read_text()) == json.loads(TABLE.read_text())


# --- bytes and figures ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["here", "there"])
def test_the_results_file_has_bytes_and_rates(way: str, request: pytest.FixtureRequest) -> None:
    ended: LmmsRun = request.getfixturevalue(way)
    lines = [one for lines in ended.log.values() for one in lines]
    figures = ended.results["throughput"]
    second = sum(one["stage"] == "second" for one in lines)
    assert figures["avg_retransmission_rate"] == pytest.approx(second / len(lines))
    assert (second == len(lines)) is (way == "there")
    for name in ("bytes_up", "bytes_down", "view_bytes", "region_bytes", "original_bytes"):
        mean = sum(one[name] for one in lines) / len(lines)
        assert figures[f"avg_{name}"] == pytest.approx(mean)
        assert mean > 0
    for task, of_task in ended.log.items():
        mean = sum(one["bytes_up"] for one in of_task) / len(of_task)
        assert figures[f"avg_{task}/bytes_up"] == pytest.approx(mean)
    assert figures["avg_own_file_rate"] == 1.0
    assert figures["avg_failed_rate"] == figures["avg_fallback_rate"] == 0.0
    assert figures["total_gen_tokens"] == sum(one["decoded_tokens"] for one in lines)
    assert figures["total_elapsed_time"] > 0
    counts = ended.samples["pope_here"][0]["token_counts"][0]
    first = ended.log["pope_here"][0]
    assert counts == {
        "input_tokens": first["prefilled_tokens"],
        "output_tokens": first["decoded_tokens"],
    }


def test_a_question_about_two_pictures_counts_both(here: LmmsRun, there: LmmsRun) -> None:
    for ended in (here, there):
        alone = [one["view_pixels"] for one in ended.log["pope_here"]]
        assert [one["view_pixels"] for one in ended.log["pairs_here"]] == [2 * alone[0]] * 2
        assert len(ended.samples["pairs_here"]) == 2
    pairs = zip(here.log["pairs_here"], there.log["pairs_here"], strict=True)
    for mine, theirs in pairs:
        assert mine["view_bytes"] == theirs["view_bytes"]
        assert mine["original_bytes"] == theirs["original_bytes"]
        assert mine["first_text"] == theirs["first_text"]


def test_an_option_without_effect_is_named(here: LmmsRun) -> None:
    output = here.process.stdout + here.process.stderr
    assert output.count("the generation option top_k has no effect on vlm_collab") == 1


def test_several_processes_share_a_task_and_report_all_of_it(
    data: Data, here: LmmsRun, tmp_path: Path
) -> None:
    log, limit = tmp_path / "log.jsonl", COUNT - 1  # odd: one process gets a question to pad with
    done = lmms_env.python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "lmms_eval", "--model", "vlm_collab", "--tasks", "textvqa_here"),
        *("--model_args", f"log={log}", "--limit", str(limit)),
        *("--include_path", str(data.folder / "tasks"), "--output_path", str(tmp_path)),
        home=data.folder / "home",
        ACCELERATE_USE_CPU="true",
    )
    (results,) = list(tmp_path.rglob("*_results.json")) or [None]
    assert results is not None, (done.stdout + done.stderr)[-3000:]
    parts = [_lines(log), _lines(tmp_path / "log.jsonl.1")]
    assert [len(part) for part in parts] == [5, 4]
    lines = sorted((one for part in parts for one in part), key=lambda one: int(one["doc_id"]))
    alone = here.log["textvqa_here"][:limit]
    assert [one["text"] for one in lines] == [one["text"] for one in alone]
    figures = json.loads(results.read_text())["throughput"]
    for name in ("bytes_up", "original_bytes"):
        assert figures[f"avg_{name}"] == pytest.approx(sum(one[name] for one in alone) / limit)


# --- refusals -----------------------------------------------------------------------------------


DRIVER = """
import json, sys
from types import SimpleNamespace
from eval.lmms_plugin.model import VlmCollab

def said(work):
    try:
        work()
    except SystemExit as error:
        return str(error)

class Stopped(VlmCollab):
    def _answer_source(self):
        raise KeyboardInterrupt

model = VlmCollab(pretrained="demo", batch_size=1, device=None)
request = SimpleNamespace(task_name="mmlu")
print(json.dumps([
    said(lambda: model.loglikelihood([request, request])),
    said(lambda: model.generate_until_multi_round([request])),
    said(lambda: model.generate_visual_cot([request])),
    said(lambda: VlmCollab(server="ws://127.0.0.1:9", batch_size=1)),
    said(lambda: VlmCollab(pretrained="demo", eta=-1)),
    said(lambda: VlmCollab(pretrained="demo", etta=1)),
    said(Stopped),
]))
"""


def test_unsupported_requests_are_refused_with_one_line(tmp_path: Path) -> None:
    done = lmms_env.python("-c", DRIVER, home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    likelihood, rounds, drawing, nobody, eta, etta, stopped = json.loads(
        done.stdout.splitlines()[-1]
    )
    kind = "choose tasks of type generate_until"
    assert likelihood == (
        f"vlm_collab: mmlu: vlm_collab cannot score given answers (loglikelihood); {kind}"
    )
    assert "mmlu: vlm_collab answers in one round only" in rounds
    assert "mmlu: vlm_collab cannot draw pictures" in drawing
    assert re.match(r"vlm_collab: .*127\.0\.0\.1.*9", nobody), nobody
    assert re.match(r"vlm_collab: .*eta", eta), eta
    assert etta.startswith("vlm_collab: model_args: there is an unknown field `etta`; options: ")
    assert stopped == "130"
    assert not any("\n" in line for line in (likelihood, rounds, drawing, nobody, eta, etta))


def test_a_task_without_any_answer_ends_the_run(data: Data, tmp_path: Path) -> None:
    """Every question of the task is longer than the model's context."""
    file = data.folder / "tasks" / "long.yaml"
    pairs = yaml.safe_load((data.folder / "tasks" / "pairs.yaml").read_text())
    long = {**pairs, "task": "long_here", "doc_to_text": "which number? " * 400}
    file.write_text(yaml.safe_dump(long), encoding="utf-8")
    try:
        done = lmms_env.python(
            *("-m", "lmms_eval", "--model", "vlm_collab", "--tasks", "long_here"),
            *("--include_path", str(data.folder / "tasks"), "--output_path", str(tmp_path)),
            home=data.folder / "home",
        )
    finally:
        file.unlink()
    assert done.returncode == 1
    assert not list(tmp_path.rglob("*_results.json"))
    output = done.stdout + done.stderr
    assert "Traceback" not in output
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"vlm_collab: 2 questions failed in a row, the last: .*too long", last), last
