"""Baselines: points computed from rows, and LLaVA-1.5-HD's procedure on a real checkpoint."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval.analysis.baselines import (
    BASELINES,
    FullRetransmission,
    GlobalOnly,
    HighResolution,
    Oracle,
    RandomLine,
    RandomRetransmission,
    SendOriginal,
    VicropAlways,
    measured,
    retransmits,
)
from eval.analysis.curves import Criterion, curve
from eval.analysis.operating_points import Point, column, same_samples, two_stage_point
from eval.analysis.records import PROVENANCE, Record
from eval.analysis.run import Run, open_run
from eval.analysis.thresholds import for_rate
from eval.runs.loading import ModelOptions
from eval.runs.loop import Share, run
from eval.runs.methods.hd import HdModel, HighResolutionMethod, hd_side, merged
from eval.tasks import open_task
from server_plugin.backends.open import preset_of
from tests.support import rows
from tests.support.pictures import photo
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Grid, Size
from vlm_collab.method.cost import flops, larger_view_cost, total_flops
from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy
from vlm_collab.method.uncertainty import batch_token_statistics

N, D, LAYERS = 576, 4096, 32


def record(index: int, first: float, second: float, bits: float, **changed: Any) -> Record:
    """A sample whose sizes differ from those of other samples."""
    sizes = {"view_bytes": 4000 + index, "region_bytes": 3000 + index}
    return rows.row(index, first, second, bits=bits, **{**sizes, **changed})


def run_of(records: list[Record], **model: Any) -> Run:
    return rows.run_of(records, **{"visual_tokens": N, "hidden_size": D, "layers": LAYERS, **model})


@pytest.fixture
def made() -> Run:
    return run_of(
        [
            record(0, 1.0, 1.0, 0.1),
            record(1, 0.0, 1.0, 2.0),
            record(2, 1.0, 0.0, 0.9),
            record(3, 0.0, 0.3, 0.2),
        ]
    )


def one(points: list[Point]) -> Point:
    assert len(points) == 1
    return points[0]


def test_the_ends_of_every_curve(made: Run) -> None:
    never, always = one(GlobalOnly().points(made)), one(FullRetransmission().points(made))
    assert (never.accuracy, never.rate, never.cost_pixels) == (0.5, 0.0, 0.0)
    assert always.accuracy == pytest.approx(2.3 / 4)
    assert (always.rate, always.cost_pixels) == (1.0, 0.5)
    assert never.up == 4001.5 + 50
    assert always.up == 4001.5 + 50 + 3001.5 + 15
    assert (never.down, always.down) == (38.0, 70.0)
    assert never.cost_bytes == pytest.approx(0.40015)
    assert always.cost_bytes == pytest.approx(0.7003)
    assert (never.flops, always.flops) == (100e6, 200e6)
    assert never.paper_flops == pytest.approx(flops(N, D, LAYERS))
    assert always.paper_flops == pytest.approx(total_flops(N, D, LAYERS, retransmitted=True))


def test_the_oracle_sends_what_it_improves(made: Run) -> None:
    point = one(Oracle().points(made))
    assert point.sent.tolist() == [0, 1, 0, 1]
    assert point.accuracy == pytest.approx(3.3 / 4)
    for baseline in BASELINES:
        if baseline.method == "two_stage":
            assert all(other.accuracy <= point.accuracy for other in baseline.points(made))


def test_random_retransmission_approaches_its_line() -> None:
    random = np.random.default_rng(1)
    records = [record(i, *random.integers(0, 2, 2).astype(float), 1.0) for i in range(400)]
    made = run_of(records)
    drawn, line = RandomRetransmission(seeds=20).points(made), RandomLine().points(made)
    never, always = one(GlobalOnly().points(made)), one(FullRetransmission().points(made))
    for point, expected in zip(drawn, line, strict=True):
        assert point.setting == expected.setting == pytest.approx(expected.rate)
        gain = always.accuracy - never.accuracy
        assert expected.accuracy == pytest.approx(never.accuracy + expected.rate * gain)
        assert expected.up == pytest.approx(never.up + expected.rate * (always.up - never.up))
        # Twenty draws over 400 samples: about five standard errors.
        assert point.rate == pytest.approx(expected.rate, abs=0.03)
        assert point.accuracy == pytest.approx(expected.accuracy, abs=0.04)
    assert (drawn[0].rate, drawn[-1].rate) == (0.0, 1.0)
    assert [p.accuracy for p in RandomRetransmission(seeds=20).points(made)] == [
        p.accuracy for p in drawn
    ]


def test_the_mean_over_seeds_is_that_of_single_draws(made: Run) -> None:
    baseline = RandomRetransmission(rates=(0.5,), seeds=7)
    singles = [baseline.of_one_seed(made, 0.5, seed) for seed in range(7)]
    point = one(baseline.points(made))
    assert point.accuracy == pytest.approx(np.mean([single.accuracy for single in singles]))
    assert point.up == pytest.approx(np.mean([single.up for single in singles]))
    assert len({single.accuracy for single in singles}) > 1


def test_sending_the_original_costs_the_same_bytes_at_any_threshold(made: Run) -> None:
    chosen, always = SendOriginal().points(made)
    # At the preset's threshold of 0.25 bits, samples 1 and 2 go through the second stage.
    assert chosen.setting == 0.25
    assert chosen.scores.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert always.scores.tolist() == [1.0, 1.0, 0.0, 0.3]
    assert chosen.up == always.up == 90_050
    assert chosen.cost_bytes == 9.0
    assert chosen.cost_pixels == 1000 * 500 / 10_000 - 1
    assert (chosen.flops, always.flops) == (150e6, 200e6)
    vicrop = one(VicropAlways().points(made))
    assert vicrop.accuracy == always.accuracy
    assert vicrop.up == always.up
    assert vicrop.paper_flops == pytest.approx(total_flops(N, D, LAYERS, retransmitted=True))
    # No run prefills like this, so executed FLOPs are unknown.
    assert math.isnan(vicrop.flops)
    assert "not executed" in vicrop.note


def test_the_kind_of_every_setting_is_named(made: Run) -> None:
    for baseline in BASELINES:
        if baseline.method != "two_stage":
            continue
        named = {point.setting is not None for point in baseline.points(made)}
        assert bool(baseline.setting_is) == (True in named), baseline.name
    assert (RandomRetransmission.setting_is, SendOriginal.setting_is) == ("rate", "η")


def test_a_policy_decides_from_a_row_as_it_does_online() -> None:
    rows = [record(0, 1, 1, 0.2), record(1, 1, 1, 0.3)]
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.25)
    assert [retransmits(policy, row) for row in rows] == [False, True]
    # Statistics that a service does not report do not count as certainty.
    bare = replace(rows[1], first_entropy=[], first_margin=[])
    assert retransmits(policy, bare)
    with pytest.raises(ConfigError, match="did not record the entropy"):
        retransmits(replace(policy, metric=Metric.ENTROPY), bare)
    with pytest.raises(ConfigError, match="did not record the min_entropy"):
        retransmits(policy, replace(bare, first_min_entropy=[]))


def test_runs_that_do_not_fit_are_refused(made: Run) -> None:
    with pytest.raises(ConfigError, match="run is a run of two_stage, not of hd"):
        HighResolution().points(made)
    with pytest.raises(ConfigError, match="holds no samples"):
        GlobalOnly().points(run_of([]))
    with pytest.raises(ConfigError, match="no samples in common"):
        same_samples([made, run_of([record(9, 1, 1, 0.1)])])
    changed = [replace(made.records[0], question="another?"), *made.records[1:]]
    with pytest.raises(ConfigError, match="question or truth of s0 differs"):
        same_samples([made, run_of(changed)])
    changed = [*made.records[:3], replace(made.records[3], truth='{"answers": []}')]
    with pytest.raises(ConfigError, match="question or truth of s3 differs"):
        same_samples([made, run_of(changed)])
    with pytest.raises(ValueError, match="probability"):
        two_stage_point(made, np.full(4, 1.5), "x")
    with pytest.raises(ValueError, match="3 decisions for 4"):
        two_stage_point(made, np.zeros(3), "x")


def test_samples_that_one_run_lacks_are_left_out_of_all(made: Run) -> None:
    # Another sample failed in each run.
    other = run_of([one for one in made.records if one.id != "s1"], name="other")
    mine = replace(made, records=[one for one in made.records if one.id != "s3"])
    for cut in same_samples([mine, other]):
        assert [one.id for one in cut.records] == ["s0", "s2"]
    assert {len(point.scores) for point in measured([mine, other])} == {2}
    assert same_samples([made, made]) == [made, made]


def test_a_run_over_a_service_has_no_paper_flops(made: Run) -> None:
    model = {**made.provenance["model"], "visual_tokens": None}
    point = one(GlobalOnly().points(replace(made, provenance={**made.provenance, "model": model})))
    assert math.isnan(point.paper_flops)
    assert point.flops == 100e6


def test_all_baselines_read_a_run_over_a_service(made: Run) -> None:
    model = {"view": [100, 100], "preset": None}
    bare = [replace(row, first_entropy=[], first_margin=[]) for row in made.records]
    service = replace(made, records=bare, provenance={"method": "two_stage", "model": model})
    names = [point.name for point in measured([service])]
    assert set(names) == {one.name for one in BASELINES if one.method == "two_stage"}
    assert names.count("sending the original") == 1


# ---- LLaVA-1.5-HD ----------------------------------------------------------------------------


def test_the_published_size_and_cost() -> None:
    assert hd_side(336) == 448
    assert round(larger_view_cost(Size(448, 448), Size(336, 336)), 2) == 0.78
    assert hd_side(112) == 150


def test_tiles_lie_as_in_the_picture() -> None:
    def tile(number: int) -> Tensor:
        cells = torch.arange(6.0).reshape(6, 1)
        return torch.cat([torch.full((1, 2), -1.0), torch.hstack([cells * 0 + number, cells])])

    large = merged([tile(number) for number in range(4)], Grid(2, 3)).reshape(4, 6, 2)
    # Left and right tile of the upper half, then of the lower half; class tokens are left out.
    assert large[..., 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    assert large[1, :, 1].tolist() == [3, 4, 5, 3, 4, 5]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"), TinyLlava(context_tokens=640))


def straightforward(
    checkpoint: Path, picture: Image.Image, question: str, tokens: int
) -> tuple[list[int], Any]:
    """Plain transformers: five pictures in the prompt, whose features are replaced."""
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    half = picture.width // 2
    corners = [(0, 0), (half, 0), (0, half), (half, half)]
    tiles = [picture.crop((x, y, x + half, y + half)).resize((112, 112), 3) for x, y in corners]
    pictures = [*tiles, picture.resize((112, 112), 3)]
    text = f"USER: {'<image>' * 5}\n{question} ASSISTANT:"
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        maps = torch.stack([*seen[:4]]).reshape(2, 2, 8, 8, -1)
        # (tile row, tile column, row, column) -> rows of the whole picture
        large = maps.permute(0, 2, 1, 3, 4).reshape(256, -1)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        on_image = inputs["input_ids"][0] == model.config.image_token_id
        embeds[0, on_image] = torch.cat([large, seen[4]])
        output = model.generate(
            inputs_embeds=embeds,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(output.logits).numpy()
    return output.sequences[0].tolist(), batch_token_statistics(logits)


def test_hd_equals_plain_transformers(checkpoint: Path) -> None:
    preset = preset_of(str(checkpoint)).with_overrides(layer=1, max_new_tokens=6)
    model = HdModel.load(str(checkpoint), preset, device="cpu", dtype="float32")
    assert model.info.visual_tokens == 5 * 64
    picture = photo(model.side, model.side)
    for question in ("what is written on the door?", "which number?"):
        answer = model.answer(picture, question, 6, ())
        tokens, steps = straightforward(checkpoint, picture, question, 6)
        assert list(answer.generation.token_ids) == tokens
        for mine, theirs in zip(answer.generation.steps, steps, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    turned = model.answer(picture.transpose(Image.Transpose.ROTATE_90), "which number?", 6, ())
    assert turned.generation.steps != answer.generation.steps, "the picture does not matter"


def test_hd_ends_at_a_stop_text(checkpoint: Path) -> None:
    preset = preset_of(str(checkpoint)).with_overrides(layer=1, max_new_tokens=8)
    model = HdModel.load(str(checkpoint), preset, device="cpu", dtype="float32")
    picture = photo(model.side, model.side)
    whole = model.answer(picture, "which number?", 8, ())
    mark = whole.generation.text[2:5]
    cut = model.answer(picture, "which number?", 8, (mark,))
    assert cut.stopped
    assert cut.generation.text == whole.generation.text.partition(mark)[0].rstrip()
    assert len(cut.generation.token_ids) <= len(whole.generation.token_ids)


def test_hd_needs_a_long_context(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path, TinyLlava(context_tokens=256))
    preset = preset_of(str(folder)).with_overrides(layer=1)
    with pytest.raises(ConfigError, match="context of 256 tokens, too few for the 320"):
        HdModel.load(str(folder), preset, device="cpu", dtype="float32")


def test_a_run_of_hd_on_the_demo_model(tmp_path: Path) -> None:
    task, share = open_task("signs", limit=3), Share(session="a")
    method = HighResolutionMethod(task, ModelOptions(name="demo"), view_quality=80)
    asyncio.run(run(method, task, tmp_path, share=share))
    made = open_run(tmp_path)
    provenance = json.loads((tmp_path / PROVENANCE).read_text())
    assert provenance["method"] == "hd"
    note = "LLaVA-1.5-HD's procedure on weights that were not trained for it"
    assert provenance["model"]["note"] == note
    point = one(measured([made]))
    assert point.name == "LLaVA-1.5-HD"
    assert point.note == note
    assert point.cost_pixels == pytest.approx(150**2 / 112**2 - 1)
    assert point.paper_flops == pytest.approx(flops(320, 192, 4))
    assert point.flops > point.paper_flops  # it includes text tokens and decoding
    assert point.accuracy == column(made, "first_score").mean()
    for row in made.records:
        assert row.view_pixels == 150**2
        assert row.first_tokens
        assert row.region_bytes == row.second_mflops == 0
        assert math.isnan(row.second_score)
    with pytest.raises(ConfigError, match="is a run of hd, not of two_stage"):
        GlobalOnly().points(made)


# ---- samples whose view shows all ---------------------------------------------------------------


def test_a_sample_without_a_useful_region_costs_nothing_at_any_threshold() -> None:
    nothing = dict.fromkeys(("region_bytes", "region_pixels", "request_bytes", "reply_bytes"), 0)
    still = {"box": [], "map": [], "map_rows": 0, "map_columns": 0, "look_mflops": 0}
    whole = rows.row(0, 0.0, 0.0, bits=9.0, second_mflops=0, **nothing, **still)
    made = rows.run_of([whole, rows.row(1, 0.0, 1.0, bits=2.0), rows.row(2, 1.0, 1.0, bits=1.0)])
    (always,) = FullRetransmission().points(made)
    (never,) = GlobalOnly().points(made)
    assert list(always.sent) == [0.0, 1.0, 1.0]
    assert always.bytes_up[0] == never.bytes_up[0]
    assert always.bytes_down[0] == never.bytes_down[0]
    assert (always.pixels[0], always.mflops[0]) == (0.0, never.mflops[0])
    assert always.paper_mflops[0] == pytest.approx(never.paper_mflops[0], nan_ok=True)
    drawn = curve(made, Criterion())
    # It is the most uncertain of the three, so the first threshold that rejects a sample sends
    # no region.
    assert list(drawn.sent) == [0, 1, 2, 3]
    assert list(drawn.rate) == pytest.approx([0, 0, 1 / 3, 2 / 3])
    assert list(drawn.bytes_up)[:2] == [drawn.bytes_up[0]] * 2
    found = for_rate(made, Criterion(), 0.4)
    assert found.expected["rate"] == pytest.approx(1 / 3)
    assert found.expected["rate_interval_95"][1] <= 1.0
