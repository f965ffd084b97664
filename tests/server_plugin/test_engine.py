"""The two-stage engine over the scripted backend: decisions, computation, accounting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from server_plugin.backends.base import GenerationRequest, RelativeAttention, Sampling
from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend, Script, digest
from server_plugin.engines.two_stage import Engine, RegionUnavailableError, Work
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box, Size
from vlm_collab.method.cost import extension_flops
from vlm_collab.method.policy import (
    Aggregate,
    AlwaysPolicy,
    Metric,
    NeverPolicy,
    RandomPolicy,
    ThresholdPolicy,
)
from vlm_collab.protocol.messages import CUT_MARK, Fallback, Finish, Retransmit, Stage

SOURCE = Size(896, 896)
VIEW = Image.new("RGB", (112, 112), (1, 2, 3))
REGION = Image.new("RGB", (112, 112), (4, 5, 6))
QUESTION = GenerationRequest("what?")
THRESHOLD = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5)


def scripted(bits: float, **more) -> FakeBackend:
    return FakeBackend(play=lambda *_: Script("one two", "three", bits, (4, 4), **more))


async def ask(backend, policy=THRESHOLD, request=QUESTION, **options):
    """Ask one question; return the outcome and the requested regions."""
    needs = []

    async def fetch(need):
        needs.append(need)
        return REGION

    engine = Engine(backend=backend, policy=policy)
    view = await backend.open_view(VIEW)
    outcome = await engine.answer(view, SOURCE, request, fetch, **options)
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
    outcome = await engine.answer(view, SOURCE, GenerationRequest("what?"), fetch)
    assert (outcome.text, outcome.fallback) == ("one two", Fallback.DECLINED)
    assert outcome.need is not None


@pytest.mark.parametrize("broken", ["relative_attention", "second_pass"])
async def test_a_failure_after_the_first_answer_loses_only_the_second(broken, monkeypatch):
    backend = scripted(1.0)

    async def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeBackend, broken, fails)
    outcome, _ = await ask(backend)
    assert (outcome.text, outcome.fallback) == ("one two", Fallback.SERVER_FAILED)


async def test_the_answer_is_no_longer_than_asked_or_allowed():
    outcome, _ = await ask(scripted(0.0), request=replace(QUESTION, max_new_tokens=1))
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

    # First: 16 prompt tokens after 64 visual ones, then 3 generated tokens (two words and the end),
    # the last of which is never fed back. Generic: 12 tokens, up to the layer that is read.
    # Second: 16, then 2 tokens.
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


# ---- conversations, several pictures, stop texts -----------------------------------------------


async def test_the_history_reaches_both_passes():
    outcome, _ = await ask(
        FakeBackend(), AlwaysPolicy(), replace(QUESTION, history=(("who?", "me"),))
    )
    assert outcome.text.endswith("who? me what?")
    assert outcome.first.text.endswith("who? me what?")


async def test_the_picture_with_the_largest_relative_attention_is_searched():
    backend = scripted(1.0)  # it looks at the last picture
    view = await backend.open_view(VIEW, VIEW, VIEW)
    needs = []

    async def fetch(need):
        needs.append(need)
        return REGION

    sizes = [Size(112, 112), Size(500, 500), SOURCE]
    outcome = await Engine(backend=backend, policy=THRESHOLD).answer(
        view, sizes, GenerationRequest("what?"), fetch
    )
    assert outcome.stage is Stage.SECOND
    assert [(need.picture, need.box) for need in needs] == [(2, Box(448, 448, 560, 560))]


@pytest.mark.parametrize(
    ("stops", "text", "finish"),
    [
        ((), "one two three four", Finish.END),
        (("three",), "one two", Finish.STOP),
        (("nowhere", "o th"), "one tw", Finish.STOP),
        (("two", "one"), "", Finish.STOP),
    ],
)
async def test_stop_texts_end_an_answer_and_are_not_part_of_it(stops, text, finish):
    backend = FakeBackend(play=lambda *_: Script("one two three four", "one two three four"))
    for policy in (NeverPolicy(), AlwaysPolicy()):
        heard = []
        outcome, _ = await ask(
            backend, policy, stop=stops, on_text=lambda stage, text, heard=heard: heard.append(text)
        )
        assert (outcome.text, outcome.finish) == (text, finish)
        assert heard[-1] == text
        used = outcome.second or outcome.first
        assert (len(used.token_ids) < 5) == bool(stops)  # four words and the end


async def test_an_answer_says_why_it_ends():
    outcome, _ = await ask(scripted(0.0), request=replace(QUESTION, max_new_tokens=2))
    assert (outcome.text, outcome.finish) == ("one two", Finish.LENGTH)
    outcome, _ = await ask(scripted(0.0))
    assert outcome.finish is Finish.END


async def test_an_early_decision_and_a_stop_text_do_not_disturb_each_other():
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST_K, 0.5, k=2)
    backend = FakeBackend(play=lambda *_: Script("one two three four", "five six", 1.0))
    outcome, needs = await ask(backend, policy, stop=("three", "six"))
    assert needs[0].first == f"one two{CUT_MARK}"
    assert (outcome.text, outcome.finish) == ("five", Finish.STOP)
    outcome, needs = await ask(backend, policy, stop=("one",))
    assert (needs[0].first, needs[0].cut) == ("", False)


async def test_tokens_make_up_the_text():
    backend = FakeBackend(play=lambda *_: Script("one two three", "four five", 0.25))
    for policy, text in ((NeverPolicy(), "one two three"), (AlwaysPolicy(), "four five")):
        outcome, _ = await ask(backend, policy, tokens=True)
        assert "".join(token.text for token in outcome.tokens) == outcome.text == text
        assert len(outcome.tokens) == len(text.split()) + 1  # the end is a token too
    assert (await ask(backend))[0].tokens == ()
    outcome, _ = await ask(backend, NeverPolicy(), tokens=True)
    assert outcome.tokens[0].surprisal_micro == 250_000


async def test_a_question_about_no_picture():
    engine = Engine(backend=FakeBackend(), policy=AlwaysPolicy())
    outcome = await engine.chat(
        GenerationRequest("what is small?", history=(("who?", "me"),)), stop=(" small",)
    )
    assert (outcome.text, outcome.finish) == ("first  who? me what is", Finish.STOP)
    assert (outcome.stage, outcome.need) == (Stage.FIRST, None)
    assert outcome.work.decoded_tokens > 0


async def test_a_sampled_answer_that_is_generated_again_is_the_same():
    """The seed is drawn once per question, not once per pass."""
    seen = []

    class Watching(FakeBackend):
        async def first_pass(self, view, request, **options):
            seen.append(request.sampling)
            return await super().first_pass(view, request, **options)

    backend = Watching(play=lambda *_: Script("one two three four", "five", 1.0))
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST_K, 0.5, k=2)
    view = await backend.open_view(VIEW)

    async def fetch(need):
        raise RegionUnavailableError(Fallback.DECLINED)

    outcome = await Engine(backend=backend, policy=policy).answer(
        view,
        SOURCE,
        replace(QUESTION, sampling=Sampling(temperature=0.7)),
        fetch,
    )
    assert outcome.text == "one two three four"
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0].seed is not None


# ---- regions that would add nothing ------------------------------------------------------------


WIDE = replace(DEFAULT_INFO, base_px=320)
"""The demo model's window size; a window covers all of a picture of up to 320 px."""


async def ask_about(backend, source, *, retransmit=Retransmit.ALWAYS, **settings):
    """Ask about a picture of a given size; fail if a region is requested."""

    async def fetch(need):
        raise AssertionError(f"{need.box} of {source} was asked for")

    view = await backend.open_view(*[VIEW] * (1 if isinstance(source, Size) else len(source)))
    engine = Engine(backend=backend, policy=settings.pop("policy", THRESHOLD), **settings)
    return await engine.answer(
        view, source, GenerationRequest("what?"), fetch, retransmit=retransmit
    )


@pytest.mark.parametrize("retransmit", [Retransmit.AUTO, Retransmit.ALWAYS])
@pytest.mark.parametrize(
    "source", [Size(112, 112), Size(64, 48), Size(20, 112), [Size(112, 100), Size(40, 40)]]
)
async def test_a_picture_no_larger_than_the_view_is_not_even_searched(source, retransmit):
    backend = scripted(1.0)
    outcome = await ask_about(backend, source, retransmit=retransmit)
    assert (outcome.text, outcome.stage) == ("one two", Stage.FIRST)
    assert (outcome.fallback, outcome.need) == (Fallback.NO_DETAIL, None)
    assert outcome.decision.retransmit
    assert outcome.uncertainty == pytest.approx(1.0)
    assert backend.generic_rows == 0


async def test_a_region_that_is_the_view_again_is_not_asked_for():
    backend = scripted(1.0)
    backend.info = WIDE
    outcome = await ask_about(backend, Size(128, 128))
    assert (outcome.text, outcome.fallback, outcome.need) == ("one two", Fallback.NO_DETAIL, None)
    assert backend.generic_rows == 1, "here the search had to tell"
    assert outcome.work.flops > 0


async def test_a_local_view_smaller_than_its_part_of_the_view_is_not_asked_for():
    outcome = await ask_about(scripted(1.0), Size(300, 300), local_view=Size(20, 20))
    assert outcome.fallback is Fallback.NO_DETAIL


async def test_a_sure_answer_about_a_small_picture_has_no_fallback():
    outcome = await ask_about(scripted(0.1), Size(64, 48), retransmit=Retransmit.AUTO)
    assert outcome.fallback is Fallback.NONE


@pytest.mark.parametrize("source", [Size(112, 112), Size(300, 300)])
async def test_an_answer_that_no_region_can_improve_is_complete(source):
    """An early decision may stop a first answer only if a second pass can replace it."""
    script = Script("one two three four", "five", 1.0, (4, 4))
    backend = FakeBackend(play=lambda *_: script, info=WIDE)
    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FIRST, 0.5)
    outcome = await ask_about(backend, source, retransmit=Retransmit.AUTO, policy=policy)
    assert (outcome.text, outcome.finish) == ("one two three four", Finish.END)
    assert outcome.fallback is Fallback.NO_DETAIL
    once = 16 + (12 if source.width > 112 else 0)
    again = 16 if source.width > 112 else 0  # stopped for a search that found no useful region
    assert outcome.work.prefilled_tokens == once + again


def test_the_unused_part_of_a_view_s_cost_is_counted_separately():
    """A first question with text between its pictures can use little of its view's cache."""
    work = Work()
    work.add(DEFAULT_INFO, 150, 100)
    width, layers = DEFAULT_INFO.hidden_size, DEFAULT_INFO.layers
    whole, beside = (extension_flops(0, tokens, width, layers) for tokens in (100, 50))
    assert work.flops == whole + beside
