"""Reports: the paper's formulas, the same files from the same runs, numbers that lead to rows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.cli.main import main
from eval.analysis.curves import Setting, ends
from eval.analysis.records import PROVENANCE, Record, write_shard
from eval.analysis.run import Run, open_run
from eval.analysis.trace import expanded
from eval.report import tables
from eval.report.demo import COMMITTED, pack
from eval.report.figures import fig4, fig5, fig6, fig8, fig9, fig10, fig12
from eval.report.findings import findings
from eval.report.inputs import Inputs, sort_runs
from eval.report.moved import moved
from eval.report.panels import sent_at
from eval.report.pictures import fig11
from eval.report.write import RESULTS, as_json, write_report
from server_plugin.models.calibration import Calibration
from tests.eval.test_sweep import saved
from tests.support.rows import row, run_of
from vlm_collab.errors import ConfigError

RUNS = COMMITTED / "runs"


# --- parts of a report ----------------------------------------------------------------------


def answers(count: int, seed: int = 0, kinds: tuple[str, ...] = ("",)) -> list[Record]:
    rng = np.random.default_rng(seed)
    truth = {"answers": ["a"], "extra": {"kind": "x", "text_size": None}}
    return [
        row(
            index,
            float(rng.random() < 0.6),
            float(rng.random() < 0.8),
            bits=float(rng.random()),
            category=kinds[index % len(kinds)],
            truth=json.dumps(truth),
            first_input_tokens=70 + index % 3,
            second_input_tokens=134,
            true_box=[10, 10, 20, 20],
        )
        for index in range(count)
    ]


KINDS = ("number", "presence", "number", "colour")


def made(**changed: Any) -> Run:
    return run_of(answers(200, kinds=KINDS), **changed)


def others(run: Run) -> Run:
    """A run with pictures of its own."""
    return replace(run, records=[replace(r, image_id=f"v{r.image_id}") for r in run.records])


def test_what_a_run_is_for_follows_from_what_it_is_of() -> None:
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
        (val, "given by --val"),
        (main_run, "repeats"),
        (replace(hd, records=[replace(r, id=f"v{r.id}") for r in hd.records]), "no samples in"),
        (made(name="hd", method="hd", task={"split": "val"}), "of another task or split"),
    ):
        with pytest.raises(ConfigError, match=line):
            sort_runs([main_run, wrong])


def test_nothing_is_chosen_on_the_split_that_is_reported() -> None:
    main_run = made()
    with pytest.raises(ConfigError, match="of the split that is reported"):
        sort_runs([main_run], val=made(name="v"))
    layers = Calibration(format=1, model="demo", layer=1, made={"task": "signs", "split": "test"})
    with pytest.raises(ConfigError, match="split that is reported"):
        sort_runs([main_run], layers=layers)
    with pytest.raises(ConfigError, match="another quality"):
        sort_runs([main_run], val=made(name="v", codec=5, task={"split": "val"}))
    with pytest.raises(ConfigError, match="asked otherwise"):
        sort_runs([main_run], val=made(task={"split": "val", "settings": {"ocr": True}}))
    # As POPE's three sets, which have other names and the same pictures.
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
def test_runs_of_a_model_that_is_used_otherwise_do_not_fit(
    model: dict[str, Any], line: str
) -> None:
    # On another task a prompt of its own is nothing wrong.
    elsewhere: list[tuple[int, dict[str, Any]]] = [(90, {"name": "gqa"})]
    for codec, more in ((90, {}), (5, {}), *(() if line == "prompt is" else elsewhere)):
        with pytest.raises(ConfigError, match=f"o used the model otherwise .*{line}"):
            sort_runs([made(), made(name="o", codec=codec, task=more, **model)])
    with pytest.raises(ConfigError, match=f"v used the model otherwise .*{line}"):
        sort_runs([made()], val=others(made(name="v", task={"split": "val"}, **model)))


def test_runs_of_other_policies_or_older_presets_fit() -> None:
    policy = {"eta": 0.9, "metric": "entropy", "aggregate": "first", "k": 3}
    older = {key: value for key, value in PRESET.items() if key not in ("turns", "view_px")}
    for preset in ({**PRESET, **policy}, older, {**PRESET, "models": ["*"]}):
        val = others(made(name="v", preset=preset, task={"split": "val"}))
        assert sort_runs([made()], val=val).val is val
    # Other tasks have other longest answers, and may have prompts of their own.
    other = made(name="o", task={"name": "gqa"}, preset={**PRESET, "max_new_tokens": 64})
    assert sort_runs([made(), other]).tasks == [other]


def test_one_folder_spelled_in_two_ways_holds_one_task() -> None:
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
    # All three together are no set beside them, and none of them is for thresholds.
    with pytest.raises(ConfigError, match=r"sets adversarial, popular, random .* side by side"):
        sort_runs([random, of("test")])
    with pytest.raises(ConfigError, match="of the split that is reported: popular"):
        sort_runs([random, popular], val=made(name="v", task={"name": "pope", "split": "popular"}))
    with pytest.raises(ConfigError, match="of another model"):
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


def test_the_paper_s_costs_are_on_the_axes() -> None:
    # n_v 64, d 192, 4 layers: the paper counts 1 + (F(n) + F(2n)) / F(n) for a retransmission.
    one, two = (24 * n * 192**2 + 4 * n**2 * 192 for n in (64, 128))
    inputs = sort_runs([made()], resamples=20)
    paper, spent = fig5(inputs)["panels"][0]["lines"]
    assert paper["x"][0] == spent["x"][0] == 1.0
    assert paper["x"][-1] == pytest.approx(2 + two / one)
    assert spent["x"][-1] == pytest.approx(2.0)  # 100 + 10 + 90 over 100
    pixels = fig4(inputs)["panels"][0]["lines"][0]["x"]
    assert (pixels[0], pixels[-1]) == (0.0, 0.5)  # regions have half the view's pixels


def test_the_same_task_asked_otherwise_has_neither_hd_s_point_nor_the_threshold() -> None:
    with_ocr = {"name": "textvqa", "settings": {"ocr": True}}
    without = made(name="t", task={"name": "textvqa", "settings": {"ocr": False}})
    inputs = sort_runs(
        [made(task=with_ocr), made(name="hd", method="hd", task=with_ocr), without],
        val=others(made(name="v", task={**with_ocr, "split": "train"})),
        resamples=20,
    )
    for figure in (fig4(inputs), fig5(inputs)):
        marks = [{one["name"] for one in panel["marks"]} for panel in figure["panels"]]
        assert marks == [{"oracle", "η from val", "HD"}, {"oracle"}]


def test_hd_is_asked_the_same_questions() -> None:
    hd = made(name="hd", method="hd")
    asked = replace(hd, records=[replace(r, question="? tokens: a, b") for r in hd.records])
    with pytest.raises(ConfigError, match="did not ask the same"):
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
def test_hd_is_of_the_model_that_is_reported(changed: dict[str, Any], line: str) -> None:
    changed = dict(changed)
    known = {"weights": "w", "dtype": "float32"}
    main_run, same = made(name="main", **known), made(name="hd", method="hd", **known)
    codec = changed.pop("codec", 90)
    wrong = made(name="hd", method="hd", codec=codec, **known)
    wrong.provenance["model"].update(changed)
    assert sort_runs([main_run, same]).hd == same
    with pytest.raises(ConfigError, match=f"hd cannot be held against main .*{line}"):
        sort_runs([main_run, wrong])


def test_hd_may_know_more_than_a_run_over_a_service() -> None:
    served = made(weights=None, dtype=None)
    served.provenance["codec"]["region"] = None
    hd = made(name="hd", method="hd", weights="w", dtype="float32")
    assert sort_runs([served, hd]).hd == hd


def test_the_order_of_hd_s_rows_is_none_of_its_figures() -> None:
    # Four questions about each picture, which are right or wrong together.
    main_run = made()
    records = [replace(r, image_id=f"i{r.index // 4}") for r in main_run.records]
    main_run = replace(main_run, records=records)
    rows = [replace(r, first_score=float(r.index // 4 % 3 == 0)) for r in records]
    shuffled = [
        replace(rows[old], index=new)
        for new, old in enumerate(np.random.default_rng(0).permutation(len(rows)))
    ]
    told = []
    for of in (rows, shuffled):
        hd = replace(made(name="hd", method="hd"), records=of)
        inputs = sort_runs([main_run, hd], resamples=200)
        (row_of_hd,) = [r for r in tables.table_baselines(inputs) if "HD" in r["name"]]
        marks = {mark["name"]: mark for mark in fig4(inputs)["panels"][0]["marks"]}
        told.append((row_of_hd["accuracy_interval"], marks["HD"]["y"]))
        index = {record.id: record.index for record in of}
        assert expanded(row_of_hd["rows"]["index"]) == [index[r.id] for r in main_run.records]
    assert told[0] == told[1]


def test_a_failed_sample_of_one_run_is_left_out_and_told(tmp_path: Path) -> None:
    of_task = {"samples": 200}
    main_run, hd = made(name="main", task=of_task), made(name="hd", method="hd", task=of_task)
    hd = replace(hd, records=[r for r in hd.records if r.index != 7])
    model = made(name="m", weights="w", task=of_task)
    model = replace(model, records=[r for r in model.records if r.index not in (7, 9)])
    quality = run_of(answers(50, kinds=KINDS), name="q", codec=5, task={"samples": 50})
    inputs = sort_runs([main_run, hd, model, quality], resamples=10)
    told = write_report(inputs, tmp_path, formats=["png"])
    rows = {one["name"]: one["rows"] for one in told["tables"]["baselines"]["rows"]}
    assert rows["LLaVA-1.5-HD"]["count"] == rows["oracle"]["count"] == 198
    assert rows["oracle"]["index"] == "0-6,8,10-199"
    # A run of fewer samples that is held against the first one alone takes nothing from others.
    assert told["figures"]["fig-12-qualities"]["panels"][0]["rows"]["count"] == 48
    (note,) = told["notes"]
    assert note == (
        "2 of 200 samples are left out of all figures: of the runs that are held against each "
        "other, some lack them (hd 1, m 2)"
    )
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert f"**{note}.**" in page
    assert "\nEach run, with `--threads 1`:\n" in page  # who calls it so gets the same bits
    # What a run itself lacks is said of it, and no more.
    assert "main: " not in page
    assert "hd: 1 of 200 samples gave no row" in page
    assert (told["runs"]["main"]["rows"], told["runs"]["hd"]["rows"]) == (200, 199)
    assert "missing" not in told["runs"]["main"]


def test_hd_stands_where_its_pixels_put_it() -> None:
    hd = made(name="hd", method="hd", visual_tokens=320)
    hd = replace(hd, records=[replace(r, view_pixels=17_778) for r in hd.records])
    inputs = sort_runs([made(), hd], resamples=20)
    marks = {mark["name"]: mark for mark in fig4(inputs)["panels"][0]["marks"]}
    assert marks["HD"]["x"] == pytest.approx(0.7778)  # 448² over 336²
    assert marks["HD"]["rows"]["run"] == "hd"
    of_numbers = {mark["name"]: mark for mark in fig4(inputs)["panels"][1]["marks"]}
    assert of_numbers["HD"]["rows"] == {"run": "hd", "count": 100, "index": "0-198:2"}


def test_aggregations_and_metrics_each_have_a_line() -> None:
    longer = [replace(r, first_tokens=[1] * 12) for r in answers(40)]
    longer = [
        replace(
            r,
            first_min_entropy=r.first_min_entropy * 6,
            first_entropy=r.first_entropy * 6,
            first_margin=r.first_margin * 6,
        )
        for r in longer
    ]
    inputs = sort_runs([run_of(longer)], resamples=20)
    names = [one["name"] for one in fig8(inputs)["panels"][0]["lines"]]
    assert names[:2] == ["full average", "starting token"]
    assert names[2:] == [f"{k}-token average" for k in (2, 3, 5, 10)]
    names = [one["name"] for one in fig6(inputs)["panels"][0]["lines"]]
    assert names == ["min-entropy", "Shannon entropy", "probability margin"]


def test_a_run_over_a_service_is_reported_as_far_as_it_knows() -> None:
    nan = [float("nan")] * 2
    served = [replace(r, first_entropy=nan, first_margin=nan) for r in answers(40)]
    run = run_of(served, visual_tokens=None, hidden_size=None, layers=None)
    del run.provenance["model"]["preset"]
    inputs = sort_runs([run], resamples=20)
    assert [one["name"] for one in fig6(inputs)["panels"][0]["lines"]] == ["min-entropy"]
    assert [one["name"] for one in fig5(inputs)["panels"][0]["lines"]] == ["as executed"]
    for _, make, _, _ in tables.TABLES.values():
        as_json(make(inputs))  # nothing that JSON does not have
    assert tables.table1(inputs) == []


def test_qualities_are_compared_on_the_questions_that_all_runs_have() -> None:
    few = run_of(answers(200)[:50], name="q", codec=5)
    told = fig12(sort_runs([run_of(answers(200)), few], resamples=20))
    assert told is not None
    (panel,) = told["panels"]
    assert [one["name"] for one in panel["lines"]] == ["JPEG 5", "JPEG 90"]
    assert {one["rows"]["count"] for one in panel["lines"]} == {50}
    assert panel["lines"][0]["x"][0] == pytest.approx(0.4)  # 4000 of 10000 bytes
    assert fig12(sort_runs([run_of(answers(20))], resamples=20)) is None


def test_models_have_a_panel_each() -> None:
    other = run_of(answers(200, seed=1), name="m", weights="w")
    told = fig10(sort_runs([run_of(answers(200)), other], resamples=20))
    assert len(told["panels"]) == 2
    assert len(fig9(sort_runs([made()], resamples=20))["panels"]) == 3


def test_thresholds_come_from_the_validation_run() -> None:
    val = others(run_of(answers(200, seed=7), name="v", task={"split": "val"}))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    for told in tables.table_chosen(inputs):
        if not told["name"].startswith("target"):
            continue
        rate = float(told["name"].split()[-1])
        assert told["val_rate"] == np.mean(sent_at(val, Setting(), told["eta"]))
        assert told["val_rate"] == pytest.approx(rate, abs=0.01)
        assert told["rate"] == np.mean(sent_at(inputs.main, Setting(), told["eta"]))


def test_what_was_chosen_leads_to_the_rows_that_it_was_chosen_on() -> None:
    val = run_of(answers(200, seed=7)[:150], name="v", task={"split": "val"})
    val = others(replace(val, records=val.records[3:]))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    *chosen, of_preset = tables.table_chosen(inputs)
    loss = {"max_accuracy_loss": 0.01, "confidence": 0.95}
    for told in chosen:
        assert told["val_rows"] == {"run": "v", "count": 147, "index": "3-149"}
        assert told["rows"]["run"] == "run"
        rate = told["name"].removeprefix("target rate ")
        wanted = {"target_rate": float(rate)} if rate != told["name"] else loss
        assert told["target"].items() >= wanted.items()
    # The preset's threshold comes from no data.
    assert not {"val_rows", "target", "val_rate"} & of_preset.keys()
    read = list(csv.DictReader(tables.csv_text([*chosen, of_preset]).splitlines()))
    assert (read[0]["val_rows_run"], read[0]["val_rows_index"]) == ("v", "3-149")
    assert (read[0]["target_target_rate"], read[3]["target_confidence"]) == ("0.1", "0.95")
    for figure in (fig4(inputs), fig5(inputs)):
        (mark,) = [one for one in figure["panels"][0]["marks"] if "eta" in one]
        assert mark["eta"] == chosen[3]["eta"]
        assert (mark["val_rows"], mark["target"]) == (chosen[3]["val_rows"], chosen[3]["target"])


def test_bad_news_is_told() -> None:
    worse = [replace(r, second_score=0.0, first_score=1.0, box=[900, 400, 901, 401]) for r in
             answers(60)]  # fmt: skip
    inputs = sort_runs([run_of(worse)], resamples=50)
    rows = {name: {"rows": make(inputs)} for name, (_, make, _, _) in tables.TABLES.items()}
    said = "\n".join(findings(rows))
    assert "worse than regions placed at random" in said
    assert "Second answers, all questions: worse than first ones (-100.0%" in said
    # A metric that beats min-entropy is named.
    margins = [replace(r, first_margin=[float(r.second_score <= r.first_score)]) for r in
               answers(200)]  # fmt: skip
    margins = [replace(r, first_margin=r.first_margin * 2) for r in margins]
    inputs = sort_runs([run_of(margins)], resamples=50)
    said = "\n".join(findings({"metrics": {"rows": tables.table_metrics(inputs)}}))
    assert "margin, not min-entropy, has the largest area" in said
    assert "does not hold 0" in said


@pytest.mark.parametrize(
    ("of_margin", "line"),
    [(0.1, "min-entropy does worse than"), (-0.2, "every metric does worse than")],
)
def test_what_holds_of_min_entropy_is_not_said_of_every_metric(of_margin: float, line: str) -> None:
    found = [
        {
            "part": "all",
            "setting": f"{metric}/full",
            "area": area,
            "area_interval": [area - 0.05, area + 0.05],
            "difference_interval": [area + 0.05, area + 0.15],
        }
        for metric, area in (("min_entropy", -0.1), ("margin", of_margin))
    ]
    (said,) = findings({"metrics": {"rows": found}})
    assert f"; {line} random choice" in said


def test_an_area_that_is_not_surely_larger_is_a_tie() -> None:
    def told(*rows: tuple[str, float, float, float]) -> list[str]:
        found = [
            {
                "part": "all",
                "setting": setting,
                "area": area,
                "area_interval": [0.01, 0.2],
                "difference_interval": [low, high],
            }
            for setting, area, low, high in rows
        ]
        return findings({"metrics": {"rows": found}})

    base = ("min_entropy/full", 0.1, 0.0, 0.0)
    # The runner-up is named, whichever it is.
    (said,) = told(base, ("entropy/full", 0.08, -0.03, -0.01), ("margin/full", 0.09, -0.02, 0.01))
    assert "min-entropy and margin are tied for the largest area" in said
    assert "(margin 0.0900 against 0.1000; the interval of the difference, " in said
    assert "[-0.0200, 0.0100], holds 0)" in said
    (said,) = told(base, ("margin/full", 0.1, 0.0, 0.0))
    assert "are tied" in said
    near = ("margin/full", 0.11, -0.01, 0.02)
    (said,) = told(base, near, ("entropy/full", 0.1, -0.01, 0.02))
    assert "min-entropy, margin and entropy are tied" in said
    assert "(margin 0.1100 against 0.1000;" in said
    (said,) = told(base, ("margin/full", 0.08, -0.03, -0.01))
    assert "min-entropy has the largest area over the random line, before margin" in said
    assert "does not hold 0" in said
    (said,) = told(base)
    assert "only one that the run knows" in said

    _, said = told(
        base,
        ("entropy/full", 0.09, -0.02, -0.01),
        ("min_entropy/first_2", 0.12, 0.01, 0.03),
        ("entropy/first_2", 0.13, 0.02, 0.04),
    )
    assert "first_2 is better than its average over the whole answer" in said
    assert "of all 4 settings entropy/first_2 has the largest area (0.1300 against 0.1000;" in said
    _, said = told(base, ("margin/full", 0.08, -0.03, -0.01),
                   ("min_entropy/first_2", 0.12, -0.01, 0.03))  # fmt: skip
    assert "the whole answer and first_2 are tied" in said
    assert "of all" not in said
    _, said = told(base, ("margin/full", 0.08, -0.03, -0.01),
                   ("min_entropy/first", 0.05, -0.07, -0.03))  # fmt: skip
    assert "best averaged over the whole answer, as in the paper, before first" in said


def test_coverage_is_of_the_questions_with_a_true_box() -> None:
    half = [replace(r, true_box=[] if r.index % 2 else r.true_box) for r in answers(60)]
    (told,) = tables.table_boxes(sort_runs([run_of(half)], resamples=20))
    assert (told["rows"]["count"], told["with_box"]) == (60, 30)
    assert expanded(told["index_with_box"]) == list(range(0, 60, 2))
    (said,) = [one for one in findings({"boxes": {"rows": [told]}}) if "Regions" in one]
    assert "of the 30 questions whose place is known" in said
    cells = tables.TABLES["boxes"][3]
    assert (cells["n"](told), cells["with a box"](told)) == ("60", "30")


def test_what_a_guarantee_is_not_of_is_told() -> None:
    val = others(run_of(answers(200, seed=7), name="v", task={"split": "val"}))
    inputs = sort_runs([run_of(answers(200))], val=val, resamples=50)
    rows = tables.table_chosen(inputs)
    best = max(rows, key=lambda row: row["accuracy"])
    best["loss_interval"] = [-0.2, -0.1]
    said = tables.chosen_notes(inputs, rows)
    assert "not of a kind of questions by itself" in said
    assert "no other split has" in said
    assert f"itself is worse than the best of these thresholds (“{best['name']}”" in said
    best["loss_interval"] = [-0.2, 0.1]
    assert tables.chosen_notes(inputs, rows).endswith("against full retransmission.")


def test_the_picture_s_rule_is_the_one_that_chose_it() -> None:
    wrong: dict[str, Any] = {"first_score": 0.0, "second_score": 1.0}
    right: dict[str, Any] = {"first_score": 1.0}
    inside, outside = {"true_box": [1, 1, 5, 5]}, {"true_box": [10, 10, 20, 20]}
    first, second, third = (replace(r, box=[0, 0, 10, 10]) for r in answers(3))
    for changed, index, rule in (
        ((right, wrong | outside, wrong | inside), 2, "with the true place in the region"),
        ((right, wrong | outside, right | inside), 1, "of none is the true place known"),
        ((right, right, right), 0, "the first row (no wrong first answer"),
    ):
        rows = [replace(r, **c) for r, c in zip((first, second, third), changed, strict=True)]
        told = fig11(sort_runs([run_of(rows)], resamples=20))
        assert told["rows"]["index"] == str(index)
        assert rule in told["rule"]


def test_tables_are_printed_whole() -> None:
    inputs = sort_runs([made()], resamples=20)
    for title, make, _, cells in tables.TABLES.values():
        rows = make(inputs)
        lines = tables.markdown(rows, cells).splitlines()
        assert len(lines) == 2 + len(rows), title
        assert {line.count("|") for line in lines} == {len(cells) + 1}, title
        if rows:
            read = list(csv.DictReader(tables.csv_text(rows).splitlines()))
            assert len(read) == len(rows)


def test_a_random_table_row_is_what_the_baseline_gives() -> None:
    inputs = sort_runs([made()], resamples=20)
    rows = {(told["name"], told["setting"]): told for told in tables.table_baselines(inputs)}
    never, always = ends(inputs.main)
    assert rows["global only", None]["accuracy"] == never.accuracy
    assert rows["full retransmission", None]["bytes_up"] == always.up
    assert 0 < rows["random retransmission", 0.3]["rate"] < 0.6
    printed = tables.TABLES["baselines"][3]
    assert printed["setting"](rows["random retransmission", 0.3]) == "rate 0.3"
    assert printed["setting"](rows["sending the original", 0.25]) == "η 0.25"
    assert printed["setting"](rows["oracle", None]) == ""
    # Nothing of it was executed: an empty cell, and a note that says so.
    vicrop = rows["ViCrop always", None]
    assert printed["FLOPs, executed"](vicrop) == ""
    assert "not executed" in printed["note"](vicrop)
    assert float(printed["FLOPs, Eq. 17-20"](vicrop)) > 1


def test_hd_s_note_is_printed() -> None:
    hd = made(name="hd", method="hd", note="not trained for it")
    rows = tables.table_baselines(sort_runs([made(), hd], resamples=20))
    text = tables.markdown(rows, tables.TABLES["baselines"][3])
    (line,) = [one for one in text.splitlines() if "LLaVA-1.5-HD" in one]
    assert "| not trained for it |" in line
    assert rows[-1]["rows"]["run"] == "hd"


@pytest.mark.parametrize(("score", "lacking"), [(1.0, "wrong"), (0.0, "right")])
def test_what_nothing_can_be_said_of_is_not_infinite(score: float, lacking: str) -> None:
    run = run_of([replace(r, first_score=score) for r in answers(40)])
    (row,) = tables.table3(sort_runs([run], resamples=20))[:1]
    assert row["overlap"] is row["distance"] is row["overlap_interval"] is None
    assert row["distance_interval"] is None
    _, make, _, cells = tables.TABLES["table-3"]
    printed = tables.markdown(make(sort_runs([run], resamples=20)), cells)
    assert "∞" not in printed
    assert printed.count(f"none (there are no {lacking} answers)") == 4
    # It is infinite where right and wrong answers have nothing in common.
    apart = [replace(r, first_min_entropy=[r.first_score] * 2) for r in answers(40)]
    printed = tables.markdown(make(sort_runs([run_of(apart)], resamples=20)), cells)
    assert "0.00 (no interval: right and wrong answers have no bins in common)" in printed
    assert "∞ (no interval: right and wrong answers have no bins in common)" in printed


# --- where numbers moved --------------------------------------------------------------------


def test_every_kind_of_difference_is_told() -> None:
    before = {
        "tables": {"t": {"rows": [{"name": "a", "x": 1.0}, {"name": "b", "x": 2.0}]}},
        "figures": {"f": {"y": [1.0, 2.0], "title": "one", "z": [1.0]}},
    }
    after = {
        "tables": {"t": {"rows": [{"name": "a", "x": 1.5}, {"name": "c", "x": 2.0}]}},
        "figures": {"f": {"y": [1.0, 2.25], "title": "two", "z": [1.0, 2.0]}},
    }
    assert moved(before, before) == []
    assert moved({"figures": {"x": 1.0}}, {"figures": {"x": 1.0 + 1e-12}}) == []
    assert moved(before, after) == [
        "tables/t/rows/a/x: 1 -> 1.5 (+0.5)",
        "tables/t/rows/b: only before",
        "tables/t/rows/c: only now",
        "figures/f/title: one -> two",
        "figures/f/y: by at most 0.25",
        "figures/f/z: 1 numbers before, 2 now",
    ]


def test_a_packed_run_is_the_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", answers(5))
    told = json.loads((folder / PROVENANCE).read_text())
    (folder / PROVENANCE).write_text(json.dumps({**told, "command": ["/some/where.py", "eval"]}))
    third = [1 / 3] * 4
    write_shard(folder / "part-00000005.parquet", [replace(r, index=r.index + 5, map=third) for r in
                answers(3)])  # fmt: skip
    before = open_run(folder)
    pack(folder)
    after = open_run(folder)
    assert {path.name for path in folder.iterdir()} == {"rows", PROVENANCE}
    assert [path.name for path in folder.glob("rows/*")] == ["part-00000000.parquet"]
    assert [replace(r, map=[]) for r in after.records] == [
        replace(r, map=[]) for r in before.records
    ]
    assert after.records[-1].map == pytest.approx(third, rel=1e-7)
    assert after.provenance == {**told, "command": ["vlm-collab", "eval"]}
    whole = (folder / "rows" / "part-00000000.parquet").read_bytes()
    pack(folder)
    assert (folder / "rows" / "part-00000000.parquet").read_bytes() == whole


# --- command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "why"), [("now", "failed"), (None, "failed or are still to be done")]
)
def test_samples_that_gave_no_row_are_told(
    finished: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "run", answers(40), samples=42)
    told = json.loads((folder / PROVENANCE).read_text())
    told["model"]["view"] = [112, 112]
    (folder / PROVENANCE).write_text(json.dumps({**told, "finished": finished}))
    out = tmp_path / "report"
    line = f"2 of 42 samples gave no row ({why}); all figures leave them out"
    for command in (
        ["eval", "report", str(folder), "--resamples", "10", "--format", "png", "--out", str(out)],
        ["eval", "sweep", str(folder), "--out", str(tmp_path / "sweep")],
        ["calibrate", str(folder), "--target-rate", "0.5", "--out", str(tmp_path / "c.yaml")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        assert line in capsys.readouterr().err
    assert line in (out / "index.md").read_text()
    assert json.loads((out / RESULTS).read_text())["runs"]["run"]["missing"] == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--format", "svg"], "there is no format 'svg'"),
        (["--against", "nothing.json"], "nothing.json is no report"),
        (["--val", "nowhere"], "nowhere holds no run"),
        (["--layers", "nowhere.yaml"], "cannot be read"),
        (["--scorer", "vqa"], "no scorer 'vqa'"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "report", str(RUNS / "test"), *arguments, "--out", str(tmp_path / "a")])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


def test_inputs_know_their_runs() -> None:
    inputs = Inputs(main=made(), val=made(name="v", task={"split": "val"}))
    assert [run.folder.name for run in inputs.runs] == ["run", "v"]
