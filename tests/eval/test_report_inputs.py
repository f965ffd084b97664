"""Inputs of a report: the part of each run, and which runs fit together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eval.analysis.run import Run
from eval.report.figures import fig4, fig9
from eval.report.inputs import Inputs, sort_runs
from server_plugin.models.calibration import Calibration
from tests.support.report_runs import made, others
from vlm_collab.errors import ConfigError


def test_a_run_s_part_follows_from_its_provenance() -> None:
    main_run = made(name="main")
    hd = made(name="hd", method="hd")
    quality = made(name="q", codec=5)
    model = made(name="m")
    model = replace(
        model,
        provenance={
            **model.provenance,
            "model": {**model.provenance["model"], "name": "other", "weights": "w"},
        },
    )
    task = made(name="t", task={"name": "gqa"})
    val = others(made(name="v", task={"split": "val"}))
    inputs = sort_runs([main_run, hd, quality, model, task], val=val)
    assert (inputs.main, inputs.hd, inputs.val) == (main_run, hd, val)
    assert [run.folder.name for run in (*inputs.qualities, *inputs.models, *inputs.tasks)] == [
        "q", "m", "t",
    ]  # fmt: skip
    for wrong, line in (
        (val, "with --val"),
        (main_run, "same settings as"),
        (replace(hd, records=[replace(r, id=f"v{r.id}") for r in hd.records]), "no samples in"),
        (made(name="hd", method="hd", task={"split": "val"}), "another task or split"),
    ):
        with pytest.raises(ConfigError, match=line):
            sort_runs([main_run, wrong])


def test_nothing_is_chosen_on_the_split_that_is_reported() -> None:
    main_run = made()
    with pytest.raises(ConfigError, match="of the reported split"):
        sort_runs([main_run], val=made(name="v"))
    layers = Calibration(format=1, model="demo", layer=1, made={"task": "signs", "split": "test"})
    with pytest.raises(ConfigError, match="measured on the reported split"):
        sort_runs([main_run], layers=layers)
    with pytest.raises(ConfigError, match="another picture quality"):
        sort_runs([main_run], val=made(name="v", codec=5, task={"split": "val"}))
    with pytest.raises(ConfigError, match="other task settings"):
        sort_runs([main_run], val=made(task={"split": "val", "settings": {"ocr": True}}))
    # A split of another name may have the same pictures, like POPE's three sets.
    with pytest.raises(ConfigError, match="100 pictures of v are reported"):
        sort_runs([main_run], val=made(name="v", task={"split": "adversarial"}))


PRESET = made().provenance["model"]["preset"]


OTHERWISE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"preset": {**PRESET, "layer": 3}}, "layer is 3 there and 1 here"),
    ({"preset": {**PRESET, "prompts": {"chat": "<image> {question}"}}}, "prompt is"),
    ({"preset": {**PRESET, "epsilon": 0.5}}, "epsilon is"),
    ({"preset": {**PRESET, "base_px": 112}}, "base_px is"),
    ({"view": [224, 224]}, r"view is \[224, 224\] there and \[100, 100\] here"),
    ({"grid": [2, 2]}, "grid is"),
    ({"dtype": "bfloat16"}, "dtype is"),
)


@pytest.mark.parametrize(("model", "line"), OTHERWISE, ids=lambda one: str(one)[:24])
def test_runs_with_other_model_settings_are_refused(model: dict[str, Any], line: str) -> None:
    # Another task may have its own prompt.
    elsewhere: list[tuple[int, dict[str, Any]]] = [(90, {"name": "gqa"})]
    for codec, more in ((90, {}), (5, {}), *(() if line == "prompt is" else elsewhere)):
        with pytest.raises(ConfigError, match=f"o has other model settings .*{line}"):
            sort_runs([made(), made(name="o", codec=codec, task=more, **model)])
    with pytest.raises(ConfigError, match=f"v has other model settings .*{line}"):
        sort_runs([made()], val=others(made(name="v", task={"split": "val"}, **model)))


def test_runs_with_other_policies_or_older_presets_are_accepted() -> None:
    policy = {"eta": 0.9, "metric": "entropy", "aggregate": "first", "k": 3}
    older = {key: value for key, value in PRESET.items() if key not in ("turns", "view_px")}
    for preset in ({**PRESET, **policy}, older, {**PRESET, "models": ["*"]}):
        val = others(made(name="v", preset=preset, task={"split": "val"}))
        assert sort_runs([made()], val=val).val is val
    # Another task may have another longest answer.
    other = made(name="o", task={"name": "gqa"}, preset={**PRESET, "max_new_tokens": 64})
    assert sort_runs([made(), other]).tasks == [other]


def test_two_paths_of_one_folder_are_the_same_task() -> None:
    def of(folder: str, file: str, **more: Any) -> Run:
        data = {"folder": folder, "files": {file: 1}}
        return made(task={"settings": {"data": data}}, **more)

    main_run = of("data/signs", "data/test-0.parquet")
    for other in (of("/x/signs", "data/test-0.parquet", name="q", codec=5),
                  of("/x/signs/data", "test-0.parquet", name="q", codec=5)):  # fmt: skip
        assert sort_runs([main_run, other]).qualities == [other]
    other = of("data/signs", "data/test-1.parquet", name="t")
    assert sort_runs([main_run, other]).tasks == [other]


def test_sets_of_one_benchmark_have_a_panel_each() -> None:
    def of(split: str, **more: Any) -> Run:
        return others(made(name=split, task={"name": "pope", "split": split}, **more))

    random, popular, hard = of("random"), of("popular"), of("adversarial")
    inputs = sort_runs([random, popular, hard], resamples=10)
    titles = ["pope, random", "pope, popular", "pope, adversarial"]
    assert [title for title, _ in inputs.parts()] == titles
    assert [one["title"] for one in fig4(inputs)["panels"]] == titles
    assert [one["title"] for one in fig9(inputs)["panels"]] == titles
    # The split with all three sets is not reported beside one set, and no set gives thresholds.
    with pytest.raises(ConfigError, match="adversarial, popular, random are reported together"):
        sort_runs([random, of("test")])
    with pytest.raises(ConfigError, match="of the reported split popular"):
        sort_runs([random, popular], val=made(name="v", task={"name": "pope", "split": "popular"}))
    with pytest.raises(ConfigError, match="another model"):
        sort_runs([random, of("popular", weights="w")])


def test_panels_are_tasks_or_kinds_of_questions() -> None:
    alone = sort_runs([made()])
    assert [title for title, _ in alone.parts()] == [
        "all questions", "reading numbers", "yes or no",
    ]  # fmt: skip
    assert [title for title, _ in alone.kinds()] == ["number", "presence", "colour"]
    several = sort_runs([made(), made(name="t", task={"name": "pope"})])
    assert [title for title, _ in several.parts()] == ["signs", "pope"]
    assert several.kinds()[1][1] is several.tasks[0]


def test_hd_with_other_questions_is_refused() -> None:
    hd = made(name="hd", method="hd")
    asked = replace(hd, records=[replace(r, question="? tokens: a, b") for r in hd.records])
    with pytest.raises(ConfigError, match=r"question or truth of \w+ differs"):
        sort_runs([made(), asked])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"name": "another"}, 'name is "another" there and "demo" here'),
        ({"weights": "others"}, "weights is"),
        ({"dtype": "bfloat16"}, "dtype is"),
        ({"codec": 5}, "codec is"),
    ],
)
def test_hd_with_another_model_or_codec_is_refused(changed: dict[str, Any], line: str) -> None:
    changed = dict(changed)
    known = {"weights": "w", "dtype": "float32"}
    main_run, same = made(name="main", **known), made(name="hd", method="hd", **known)
    codec = changed.pop("codec", 90)
    wrong = made(name="hd", method="hd", codec=codec, **known)
    wrong.provenance["model"].update(changed)
    assert sort_runs([main_run, same]).hd == same
    with pytest.raises(ConfigError, match=f"hd cannot be compared with main .*{line}"):
        sort_runs([main_run, wrong])


def test_hd_is_accepted_beside_a_run_over_a_service_that_lacks_facts() -> None:
    served = made(weights=None, dtype=None)
    served.provenance["codec"]["region"] = None
    hd = made(name="hd", method="hd", weights="w", dtype="float32")
    assert sort_runs([served, hd]).hd == hd


def test_inputs_list_their_runs() -> None:
    inputs = Inputs(main=made(), val=made(name="v", task={"split": "val"}))
    assert [run.folder.name for run in inputs.runs] == ["run", "v"]
