"""Algorithm 1 over the scripted backend: who decides, what is computed, what is accounted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from server_plugin.backend import RelativeAttention
from server_plugin.backends.fake import FakeBackend, Script, digest
from server_plugin.engine import Engine, RegionUnavailableError
from vlm_collab.cost import extension_flops
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box, Size
from vlm_collab.messages import Fallback, Retransmit, Stage
from vlm_collab.policy import (
    Aggregate,
    AlwaysPolicy,
    Metric,
    NeverPolicy,
    RandomPolicy,
    ThresholdPolicy,
)

SOURCE = Size(896, 896)
VIEW = Image.new("RGB", (112, 112), (1, 2, 3))
REGION = Image.new("RGB", (112, 112), (4, 5, 6))
THRESHOLD = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5)


def scripted(bits: float, **more) -> FakeBackend:
    return FakeBackend(play=lambda *_: Script("one two", "three", bits, (4, 4), **more))


async def ask(backend, policy=THRESHOLD, **options):
    """One question; returns the outcome and the needs that were asked for."""
    needs = []

    async def fetch(need):
        needs.append(need)
        return REGION

    engine = Engine(backend=backend, policy=policy)
    view = await backend.open_view(VIEW)
    outcome = await engine.answer(view, SOURCE, "what?", fetch, **options)
    await backend.release(view)
    return outcome, needs


async def test_a_sure_answer_computes_neither_map_nor_second_pass():
    backend = scripted(0.1)
    outcome, needs = await ask(backend)
    assert (outcome.text, outcome.stage, outcome.need) == ("one two", Stage.FIRST, None)
    assert needs == []
    assert backend.generic_rows == 0


async def test_an_unsure_answer_asks_for_the_place_the_model_looks_at():
    outcome, needs = await ask(scripted(1.0))
    assert (outcome.text, outcome.stage, outcome.fallback) == ("three", Stage.SECOND, Fallback.NONE)
    # Cell (4, 4) of an 8 × 8 grid over 896 px: centre 504, half of 112 px.
    assert [need.box for need in needs] == [Box(448, 448, 560, 560)]
    assert needs[0].first == "one two"
    assert needs[0].uncertainty == pytest.approx(1.0)


async def test_the_second_pass_sees_the_region_that_came():
    backend = FakeBackend()
    outcome, _ = await ask(backend, AlwaysPolicy())
    assert outcome.text == f"second {digest(VIEW)} {digest(REGION)} what?"


@pytest.mark.parametrize(
    ("policy", "bits", "stage"),
    [
        (ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5), 0.5, Stage.SECOND),
        (ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.51), 0.5, Stage.FIRST),
        (ThresholdPolicy(Metric.ENTROPY, Aggregate.FIRST, 0.9), 0.5, Stage.FIRST),
        (ThresholdPolicy(Metric.MARGIN, Aggregate.FIRST_K, 0.5), 0.5, Stage.SECOND),
        (ThresholdPolicy(Metric.MARGIN, Aggregate.FULL, 0.1), 0.5, Stage.FIRST),
        (AlwaysPolicy(), 0.0, Stage.SECOND),
        (NeverPolicy(), 9.0, Stage.FIRST),
        (RandomPolicy(1.0), 0.0, Stage.SECOND),
        (RandomPolicy(0.0), 9.0, Stage.FIRST),
    ],
)
async def test_policies(policy, bits, stage):
    outcome, _ = await ask(scripted(bits), policy)
    assert outcome.stage is stage


async def test_a_question_may_force_or_forbid_the_second_stage():
    forced, _ = await ask(scripted(0.0), retransmit=Retransmit.ALWAYS)
    forbidden, _ = await ask(scripted(9.0), retransmit=Retransmit.NEVER)
    assert (forced.stage, forbidden.stage) == (Stage.SECOND, Stage.FIRST)


@pytest.mark.parametrize("eta", [-1.0, float("inf"), float("nan")])
async def test_an_impossible_threshold_is_refused(eta):
    with pytest.raises(ConfigError):
        await ask(scripted(0.0), eta=eta)


async def test_a_policy_without_threshold_takes_none():
    with pytest.raises(ConfigError):
        await ask(scripted(0.0), AlwaysPolicy(), eta=0.5)


async def test_without_a_region_the_first_answer_stands():
    backend = scripted(1.0)
    view = await backend.open_view(VIEW)

    async def fetch(need):
        raise RegionUnavailableError(Fallback.DECLINED)

    engine = Engine(backend=backend, policy=THRESHOLD)
    outcome = await engine.answer(view, SOURCE, "what?", fetch)
    assert (outcome.text, outcome.fallback) == ("one two", Fallback.DECLINED)
    assert outcome.need is not None


@pytest.mark.parametrize("broken", ["relative_attention", "second_pass"])
async def test_a_runtime_that_fails_after_the_first_answer_costs_only_the_second(
    broken, monkeypatch
):
    backend = scripted(1.0)

    async def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeBackend, broken, fails)
    outcome, _ = await ask(backend)
    assert (outcome.text, outcome.fallback) == ("one two", Fallback.SERVER_FAILED)


async def test_the_answer_is_no_longer_than_asked_or_allowed():
    outcome, _ = await ask(scripted(0.0), max_new_tokens=1)
    assert outcome.text == "one"
    assert len(outcome.first.token_ids) == 1


async def test_texts_come_with_their_stage():
    seen = []
    await ask(scripted(1.0), on_text=lambda stage, text: seen.append((stage, text)))
    assert (Stage.FIRST, "one two") in seen
    assert seen[-1] == (Stage.SECOND, "three")
    assert [stage for stage, _ in seen] == sorted(stage for stage, _ in seen)


async def test_work_adds_up_what_was_really_computed():
    backend = scripted(1.0)
    outcome, _ = await ask(backend)
    info = backend.info

    def cost(cached: int, added: int, layers: int = info.layers) -> int:
        return extension_flops(cached, added, info.hidden_size, layers)

    # First: 16 prompt tokens on 64 visual ones, then 3 generated tokens (two words and the end),
    # the last of which is never fed back. Generic: 12 tokens, no further than the layer that is
    # read. Second: 16, then 2 tokens.
    first = cost(64, 16) + cost(80, 1) + cost(81, 1)
    expected = first + cost(64, 12, info.layer + 1) + cost(64, 16) + cost(80, 1)
    assert outcome.work.flops == expected
    assert outcome.work.prefilled_tokens == 16 + 12 + 16
    assert outcome.work.decoded_tokens == 3 + 2


async def test_a_flat_map_still_names_a_box_inside_the_image(monkeypatch):
    backend = scripted(1.0)

    async def flat(self, view, first):
        return RelativeAttention(
            maps=(np.ones((8, 8)),), prefilled_tokens=0, context_tokens=0, layers=2
        )

    monkeypatch.setattr(FakeBackend, "relative_attention", flat)
    _, (need,) = await ask(backend)
    assert 0 <= need.box.left < need.box.right <= SOURCE.width
