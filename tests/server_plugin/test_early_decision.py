"""Early decision with the scripted backend: tokens generated, decisions, completed answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from PIL import Image

from edge_client.client import EdgeClient
from server_plugin.backends.base import Generation, GenerationRequest
from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.engines.two_stage import Engine, Outcome, RegionNeed, RegionUnavailableError
from server_plugin.models.presets import preset_named
from server_plugin.service.runner import running
from tests.e2e.common import photo
from tests.support.oracle import picture as blocks
from tests.support.tiny_llava import save_tiny_llava
from tests.support.wire import UNSURE, edge, picture, service, settled
from vlm_collab.errors import ImageError
from vlm_collab.geometry import Size
from vlm_collab.method.cost import extension_flops
from vlm_collab.method.policy import (
    Aggregate,
    AlwaysPolicy,
    Metric,
    NeverPolicy,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    aggregate,
)
from vlm_collab.protocol.edge_session import RegionWanted
from vlm_collab.protocol.messages import CUT_MARK, DeclineReason, Fallback, Retransmit, Stage

FIRST = "one two three four five six seven"
VIEW = Image.new("RGB", (112, 112), (1, 2, 3))
REGION = Image.new("RGB", (112, 112), (4, 5, 6))


def threshold(how: Aggregate = Aggregate.FIRST_K, **more) -> ThresholdPolicy:
    return ThresholdPolicy(Metric.MIN_ENTROPY, how, 0.5, **more)


@dataclass(slots=True, eq=False)
class Recording(FakeBackend):
    """Keeps each first answer that it generates; can fail while it generates the second."""

    firsts: list[Generation] = field(default_factory=list)
    fail_again: bool = False

    async def first_pass(self, *args, **kwargs) -> Generation:
        if self.firsts and self.fail_again:
            raise RuntimeError("out of memory")
        self.firsts.append(await FakeBackend.first_pass(self, *args, **kwargs))
        return self.firsts[-1]


def scripted(bits: float = 1.0, first: str = FIRST, **more) -> Recording:
    return Recording(play=lambda *_: Script(first, "seen", bits, (4, 4)), **more)


async def ask(
    backend: FakeBackend,
    policy: Policy,
    *,
    provisional: bool = False,
    failing: Exception | None = None,
    max_new_tokens: int | None = None,
    **options,
) -> tuple[Outcome, list[RegionNeed]]:
    needs = []

    async def fetch(need):
        needs.append(need)
        if failing is not None:
            raise failing
        return REGION

    engine = Engine(backend=backend, policy=policy, provisional=provisional)
    view = await backend.open_view(VIEW)
    outcome = await engine.answer(
        view,
        Size(896, 896),
        GenerationRequest("what?", max_new_tokens=max_new_tokens),
        fetch,
        **options,
    )
    await backend.release(view)
    return outcome, needs


def lengths(backend: Recording) -> list[int]:
    return [len(first.token_ids) for first in backend.firsts]


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [
        (threshold(), 5),
        (threshold(k=3), 3),
        (threshold(Aggregate.FIRST), 1),
        (threshold(Aggregate.FULL), 8),  # seven words and the end token
        (threshold(k=7), 7),
        (threshold(k=8), 8),
        (threshold(k=50), 8),
        (AlwaysPolicy(), 8),
        (AlwaysPolicy(aggregate=Aggregate.FIRST_K), 5),
        (AlwaysPolicy(aggregate=Aggregate.FIRST_K, k=2), 2),
        (RandomPolicy(1.0, aggregate=Aggregate.FIRST), 1),
    ],
)
async def test_an_unsure_answer_stops_once_that_is_known(policy, tokens):
    early, whole = scripted(), scripted()
    outcome, (need,) = await ask(early, policy)
    reference, (full_need,) = await ask(whole, policy, provisional=True)
    assert (lengths(early), lengths(whole)) == ([tokens], [8])
    assert need.cut is (tokens < 8)
    words = " ".join(FIRST.split()[:tokens])
    assert need.first == (words + CUT_MARK if need.cut else FIRST)
    # Everything else is as if the answer had been generated to its end.
    assert (full_need.first, full_need.cut) == (FIRST, False)
    assert outcome.decision == reference.decision
    assert need.uncertainty == full_need.uncertainty
    assert need.box == full_need.box
    assert (outcome.text, outcome.stage) == (reference.text, reference.stage)
    assert outcome.work.decoded_tokens == reference.work.decoded_tokens - (8 - tokens)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (threshold(), {}),
        (threshold(Aggregate.FIRST), {}),
        (NeverPolicy(aggregate=Aggregate.FIRST_K), {}),
        (RandomPolicy(0.0, aggregate=Aggregate.FIRST_K), {}),
    ],
)
async def test_an_answer_that_is_sure_enough_continues_in_one_generation(policy, options):
    backend = scripted(0.1)
    outcome, needs = await ask(backend, policy, **options)
    assert (outcome.text, outcome.stage, needs) == (FIRST, Stage.FIRST, [])
    assert lengths(backend) == [8]


@pytest.mark.parametrize(
    ("bits", "options", "tokens"),
    [
        (1.0, {"eta": 2.0}, 8),
        (0.1, {"eta": 0.05}, 5),
        (0.1, {"retransmit": Retransmit.ALWAYS}, 5),
        (1.0, {"retransmit": Retransmit.NEVER}, 8),
    ],
)
async def test_the_question_s_own_options_decide(bits, options, tokens):
    backend = scripted(bits)
    outcome, _ = await ask(backend, threshold(), **options)
    assert lengths(backend) == [tokens]
    assert outcome.decision.retransmit is (tokens == 5)


@pytest.mark.parametrize("include_end", [True, False])
@pytest.mark.parametrize("words", range(1, 9))
async def test_answers_around_k_are_decided_as_whole_ones(words, include_end):
    """The end token may be before, at or after the k-th token."""
    policy = threshold(k=4, include_end=include_end)
    first = " ".join(FIRST.split()[:words])
    early, (need,) = await ask(scripted(first=first), policy)
    whole, (full,) = await ask(scripted(first=first), policy, provisional=True)
    assert early.decision == whole.decision
    assert need.cut is (words > 3)
    assert full.first.startswith(need.first.removesuffix(CUT_MARK))


async def test_an_answer_cut_by_its_length_limit_is_whole():
    backend = scripted()
    _, (need,) = await ask(backend, threshold(), max_new_tokens=5)
    assert (need.cut, need.first) == (False, "one two three four five")
    outcome, _ = await ask(
        scripted(), threshold(), max_new_tokens=5, failing=RegionUnavailableError(Fallback.DECLINED)
    )
    assert outcome.text == "one two three four five"
    assert outcome.work.prefilled_tokens == 16 + 12  # one first pass


@pytest.mark.parametrize(
    ("failing", "fallback"),
    [
        (RegionUnavailableError(Fallback.DECLINED), Fallback.DECLINED),
        (RegionUnavailableError(Fallback.DEADLINE), Fallback.DEADLINE),
        (RegionUnavailableError(Fallback.BAD_REGION), Fallback.BAD_REGION),
        (ImageError("not a picture"), Fallback.BAD_REGION),
        (RuntimeError("broken"), Fallback.SERVER_FAILED),
    ],
)
async def test_without_a_second_pass_the_first_answer_is_completed(failing, fallback):
    backend = scripted()
    outcome, (need,) = await ask(backend, threshold(), failing=failing)
    reference, _ = await ask(scripted(), threshold(), failing=failing, provisional=True)
    assert need.first == "one two three four five" + CUT_MARK
    assert (outcome.text, outcome.stage, outcome.fallback) == (FIRST, Stage.FIRST, fallback)
    assert outcome.first.token_ids == reference.first.token_ids
    assert outcome.decision == reference.decision
    assert outcome.uncertainty == reference.uncertainty
    assert lengths(backend) == [5, 8]


async def test_the_cost_of_completing_an_answer_is_counted():
    backend = scripted()
    outcome, _ = await ask(
        backend, threshold(), failing=RegionUnavailableError(Fallback.DECLINED)
    )  # fmt: skip
    info = backend.info

    def first_pass(tokens: int) -> int:
        steps = [(64, 16), *((80 + i, 1) for i in range(tokens - 1))]
        return sum(extension_flops(m, n, info.hidden_size, info.layers) for m, n in steps)

    generic = extension_flops(64, 12, info.hidden_size, info.layer + 1)
    assert outcome.work.flops == first_pass(5) + generic + first_pass(8)
    assert outcome.work.prefilled_tokens == 16 + 12 + 16
    assert outcome.work.decoded_tokens == 5 + 8


@pytest.mark.parametrize("broken", ["relative_attention", "second_pass"])
async def test_when_the_second_stage_fails_the_first_answer_is_completed(broken, monkeypatch):
    async def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeBackend, broken, fails)
    outcome, _ = await ask(scripted(), threshold())
    assert (outcome.text, outcome.fallback) == (FIRST, Fallback.SERVER_FAILED)


async def test_an_answer_that_cannot_be_completed_says_that_it_is_cut(caplog):
    backend = scripted(fail_again=True)
    outcome, _ = await ask(
        backend, threshold(), failing=RegionUnavailableError(Fallback.DEADLINE)
    )  # fmt: skip
    assert outcome.text == "one two three four five" + CUT_MARK
    assert (outcome.stage, outcome.fallback) == (Stage.FIRST, Fallback.DEADLINE)
    assert "could not be completed" in caplog.text


async def test_the_completion_is_not_streamed():
    """The client already has the text of the first pass."""
    seen = []
    await ask(
        scripted(),
        threshold(),
        failing=RegionUnavailableError(Fallback.DECLINED),
        on_text=lambda stage, text: seen.append((stage, text)),
    )
    assert seen == [(Stage.FIRST, " ".join(FIRST.split()[:n])) for n in range(1, 6)]


# ---- on a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Aggregate.FIRST_K, Aggregate.FIRST])
async def test_a_model_s_early_decisions_are_those_of_its_whole_answers(how, tmp_path):
    """Real answers, each once with a second pass and once completed without it."""
    folder = save_tiny_llava(tmp_path)
    preset = preset_named("demo").with_overrides(layer=1)
    backend = TransformersBackend.load(str(folder), preset, device="cpu")
    region = blocks(99, Size(60, 60))

    async def fetch(need):
        return region

    async def decline(need):
        raise RegionUnavailableError(Fallback.DECLINED)

    for number in range(8):
        view = await backend.open_view(blocks(number, backend.info.view))
        question = f"what is number {number}?"
        whole = await backend.first_pass(view, GenerationRequest(question, max_new_tokens=10))
        # Just above or just below the uncertainty of this answer's first tokens.
        eta = aggregate(whole.steps, Metric.MIN_ENTROPY, how, 3) * (1.01 if number % 2 else 0.99)
        policy = ThresholdPolicy(Metric.MIN_ENTROPY, how, eta, k=3)
        early = Engine(backend=backend, policy=policy, max_new_tokens=10)
        full = replace(early, provisional=True)
        one = await early.answer(view, Size(1200, 800), GenerationRequest(question), fetch)
        other = await full.answer(view, Size(1200, 800), GenerationRequest(question), fetch)
        assert one.decision == other.decision
        assert (one.text, one.stage) == (other.text, other.stage)
        assert other.first.token_ids == whole.token_ids
        needed = policy.tokens_needed if one.decision.retransmit else len(whole.token_ids)
        assert one.first.token_ids == whole.token_ids[:needed]
        owed = await early.answer(view, Size(300, 200), GenerationRequest(question), decline)
        assert owed.text == whole.text
        assert one.decision.retransmit is (number % 2 == 0)
        await backend.release(view)
    await backend.close()


# ---- over the wire ---------------------------------------------------------------------------


async def test_declining_gives_the_complete_first_answer():
    running_service = service(policy=threshold(k=3))
    async with running(running_service) as url, edge(url) as client:
        for _ in range(2):
            id = await client.ask(UNSURE, picture())
            wanted = await client.next()
            assert isinstance(wanted, RegionWanted)
            assert wanted.request.first.endswith(f"what{CUT_MARK}")
            client.session.decline(id, DeclineReason.PRIVACY)
            answer = await client.next()
            assert answer.text == f"{wanted.request.first.removesuffix('what…')}{UNSURE}"
            assert (answer.stage, answer.fallback) == (Stage.FIRST, Fallback.DECLINED)
        await settled(running_service)


async def test_a_late_region_loses_only_the_second_answer():
    limits = {"region_deadline_s": 0.05}
    async with running(service(policy=threshold(k=3), limits=limits)) as url, edge(url) as client:
        await client.ask(UNSURE, picture())
        assert isinstance(await client.next(), RegionWanted)
        answer = await client.next()
        assert answer.text.endswith(UNSURE)
        assert answer.fallback is Fallback.DEADLINE


async def test_an_edge_s_user_sees_the_first_answer_whole_when_there_is_no_second():
    backend = FakeBackend(play=lambda *_: Script(FIRST, "seen", 1.0, fail_second=True))
    async with running(service(backend, policy=threshold())) as url, EdgeClient(url) as client:
        answer = await client.ask(photo(1), "what?")
    assert answer.fallback is Fallback.SERVER_FAILED
    assert (answer.text, answer.first_text) == (FIRST, FIRST)
