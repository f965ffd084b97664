"""Parts of the lmms-eval plugin that need no lmms-eval: options, pictures, both answer sources."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as Pillow

from eval.lmms_plugin.figures import all_figures, sum_totals, totals_of
from eval.lmms_plugin.in_process import InProcess
from eval.lmms_plugin.originals import RE_ENCODED_QUALITY, OriginalPicture, originals_of
from eval.lmms_plugin.over_service import ServiceSource
from eval.lmms_plugin.questions import LmmsQuestion, questions_of
from eval.lmms_plugin.runner import AnswerSource, CostedAnswer, answer_all
from eval.lmms_plugin.settings import LmmsSettings, settings_from
from eval.runs.loop import MOST_FAILURES_IN_A_ROW
from eval.runs.methods.method import SampleError
from server_plugin.backends.open import open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.service import connection
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from tests.support.pictures import photo, saved, turned
from vlm_collab.errors import AuthenticationError, CollabError, ConfigError
from vlm_collab.method.policy import Aggregate, Metric
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.messages import Options, Retransmit

JPEG = saved(photo(640, 480), "JPEG", quality=90)
TURNED = turned(photo(640, 480), 6)
PNG = saved(photo(640, 480), "PNG")


def requests(
    text: str = "which number?", count: int = 1, task: str = "t", **generation: Any
) -> list[Any]:
    """Requests as lmms-eval passes them to `generate_until`."""

    return [
        SimpleNamespace(
            args=(
                text,
                generation,
                lambda doc: [doc["image"].convert("RGB")],
                doc_id,
                task,
                "test",
            ),
            metadata={},
        )
        for doc_id in range(count)
    ]


def asked(text: str = "which number?", **generation: Any) -> LmmsQuestion:
    (question,) = questions_of(requests(text, **generation), LmmsSettings(), print)
    return question


# --- settings -----------------------------------------------------------------------------------


def test_settings_come_from_model_args() -> None:
    given = {"eta": 1, "metric": "entropy", "aggregate": "first_k", "k": 5, "codec": "webp"}
    settings = settings_from({**given, "policy": "always", "batch_size": 1, "max_batch_size": None})
    assert settings == LmmsSettings(
        eta=1.0,
        metric=Metric.ENTROPY,
        aggregate=Aggregate.FIRST_K,
        k=5,
        codec="webp",
        policy="always",
    )
    assert (settings.retransmit, settings.picture_codec) == (Retransmit.ALWAYS, Codec.WEBP)
    assert settings.preset_options() == {
        "metric": Metric.ENTROPY,
        "aggregate": Aggregate.FIRST_K,
        "eta": 1.0,
        "k": 5,
    }
    assert settings.model == "demo"


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({"batch_size": 1}, (None, None)),
        ({"batch_size": "8"}, (8, None)),
        ({"batch_size": "8", "batch": 2}, (2, None)),
        ({"batch_size": "auto"}, (None, None)),
        ({"batch_size": "8", "server": "ws://a"}, (None, 8)),
    ],
)
def test_lmms_eval_s_batch_size_counts_unless_it_is_the_default(
    given: dict[str, Any], settled: tuple[int | None, int | None]
) -> None:
    settings = settings_from(given)
    assert (settings.batch, settings.concurrency) == settled


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"etta": 1}, "unknown field `etta`; options: pretrained, "),
        ({"eta": "high"}, "for `eta`"),
        ({"policy": "random"}, "Invalid enum value 'random'"),
        ({"view_quality": 0}, "for `view_quality`"),
        ({"codec": "gif"}, "Invalid enum value 'gif'"),
        ({"token": "x"}, "token is only for a service"),
        ({"token_file": "x"}, "token_file is only for a service"),
        ({"concurrency": 3}, "concurrency is only for a service"),
        ({"server": "ws://a", "pretrained": "demo"}, "the service sets pretrained"),
        ({"server": "ws://a", "metric": "margin"}, "the service sets metric"),
        ({"server": "ws://a", "region_quality": 5}, "the service sets region_quality"),
    ],
)
def test_wrong_settings_are_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_from(given)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_COLLAB_TOKEN", "secret")
    assert settings_from({"server": "ws://a"}).token == "secret"
    assert settings_from({"server": "ws://a", "token": "mine"}).token == "mine"
    assert settings_from({}).token is None


def test_a_token_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_COLLAB_TOKEN", "another")
    file = tmp_path / "token"
    given = {"server": "ws://a", "token_file": str(file)}
    with pytest.raises(ConfigError, match=r"model_args: token_file .*: No such file"):
        settings_from(given)
    file.write_text("secret\n")
    assert settings_from(given).token == "secret"
    with pytest.raises(ConfigError, match="not both"):
        settings_from({**given, "token": "mine"})


# --- requests -----------------------------------------------------------------------------------


def test_a_task_s_generation_options_are_sent() -> None:
    assert asked(until=["\n\n", "", "\n\n"], max_new_tokens=16, temperature=0.0).options == (
        Options(max_new_tokens=16, stop=("\n\n",))
    )
    assert asked(until="END").options == Options(max_new_tokens=64, stop=("END",))
    assert asked(until=None, max_gen_toks=9, top_p=0, num_beams=1).options.max_new_tokens == 9
    sampled = asked(temperature=0.7, top_p=0.9).options
    assert (sampled.temperature, sampled.top_p) == (0.7, 0.9)
    assert sampled.seed is not None
    assert asked(temperature=0.7, do_sample=False).options == Options(max_new_tokens=64)


def test_the_user_s_longest_answer_has_priority() -> None:
    (question,) = questions_of(requests(max_new_tokens=512), LmmsSettings(max_new_tokens=20), print)
    assert question.options.max_new_tokens == 20


def test_a_threshold_is_sent_only_to_a_service() -> None:
    for settings, eta in (
        (LmmsSettings(eta=1.0), None),
        (LmmsSettings(eta=1.0, server="ws://a"), 1.0),
    ):
        (question,) = questions_of(requests(), settings, print)
        assert question.options.eta == eta


def test_repeated_questions_have_seeds_of_their_own_and_runs_repeat() -> None:
    same = requests(temperature=1.0) * 3

    def seeds(**settings: Any) -> list[int | None]:
        asked_again = questions_of(same, LmmsSettings(**settings), print)
        return [question.options.seed for question in asked_again]

    assert len(set(seeds())) == 3
    assert seeds() == seeds() != seeds(seed=1)


def test_image_placeholders_in_the_text_are_removed() -> None:
    assert asked("<image>\nwhich <image> number?").text == "which  number?"
    assert asked(" which number?\n").text == " which number?\n"


def test_unsupported_options_are_refused_and_ignored_ones_named_once() -> None:
    with pytest.raises(ConfigError, match="t sets num_beams=3"):
        asked(num_beams=3)
    with pytest.raises(ConfigError, match="t has 5 stop texts"):
        asked(until=list("abcde"))
    warned: list[str] = []
    questions_of(requests(count=3, top_k=5), LmmsSettings(), warned.append)
    assert warned == ["t: the generation option top_k has no effect on vlm_collab"]


# --- pictures -----------------------------------------------------------------------------------


def documents(images: Sequence[Any], *, lists: bool = False, **columns: Any) -> dict[str, Any]:
    """A data set with one row per picture (or list of pictures)."""
    kind = List(Image()) if lists else Image()
    rows = {"image": list(images), **columns}
    features = Features({"image": kind} | {name: Image() for name in columns})
    return {"t": {"test": Dataset.from_dict(rows, features=features)}}


def file(data: bytes, name: str | None = "a.jpg") -> dict[str, Any]:
    return {"bytes": data, "path": name}


def found(
    rows: Mapping[str, Any], visuals: Callable[[Mapping[str, Any]], Any] | None = None
) -> list[OriginalPicture]:
    show = visuals or (lambda doc: [doc["image"].convert("RGB")])
    question = LmmsQuestion(
        task="t", split="test", doc_id=0, text="?", options=Options(), visuals=show
    )
    return originals_of(question, rows)


@pytest.mark.parametrize("data", [JPEG, TURNED], ids=["upright", "turned"])
def test_the_stored_file_is_found_by_its_pixels(data: bytes) -> None:
    other = file(saved(photo(640, 480).rotate(180), "JPEG"))
    (one,) = found(documents([file(data)], before=[other]))
    assert (one.original_bytes, one.own_file) == (len(data), True)
    assert one.picture.original_bytes == len(data)
    assert one.picture.size == (640, 480)


def test_a_stored_path_counts_as_the_file_there(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    rows = {"t": {"test": Dataset.from_dict(
        {"image": [str(tmp_path / "a.jpg")]}, features=Features({"image": Image()})
    )}}  # fmt: skip
    (one,) = found(rows)
    assert (one.original_bytes, one.own_file) == (len(JPEG), True)
    (given,) = found(rows, lambda doc: str(tmp_path / "a.jpg"))
    assert (given.original_bytes, given.own_file) == (len(JPEG), True)


def test_a_picture_that_the_task_changed_is_taken_as_it_is() -> None:
    def cropped(document: Mapping[str, Any]) -> Any:
        return document["image"].convert("RGB").crop((0, 0, 320, 480))

    (one,) = found(documents([file(JPEG)]), cropped)
    pixels = Pillow.open(io.BytesIO(JPEG)).convert("RGB").crop((0, 0, 320, 480))
    assert not one.own_file
    assert one.original_bytes == len(encode(pixels, Codec.JPEG, RE_ENCODED_QUALITY))
    assert one.picture.decoded().tobytes() == pixels.tobytes()


@pytest.mark.parametrize(("name", "own"), [("a.png", True), (None, False)])
def test_a_png_counts_as_the_original_only_under_a_name(name: str | None, own: bool) -> None:
    (one,) = found(documents([file(PNG, name)]))
    re_encoded = len(encode(photo(640, 480), Codec.JPEG, RE_ENCODED_QUALITY))
    assert (one.own_file, one.original_bytes) == (own, len(PNG) if own else re_encoded)
    assert one.picture.decoded().tobytes() == photo(640, 480).tobytes()


def test_several_pictures_come_in_the_order_shown() -> None:
    small = saved(photo(64, 48), "JPEG")
    rows = documents([[file(JPEG), file(small)]], lists=True)
    both = found(rows, lambda doc: [doc["image"][::-1]])
    assert [one.original_bytes for one in both] == [len(small), len(JPEG)]


@pytest.mark.parametrize(
    ("visuals", "line"),
    [
        (lambda doc: [], "the question has no picture"),
        (lambda doc: None, "the question has no picture"),
        (lambda doc: [doc["image"]] * 17, "has 17 pictures; the limit is 16"),
        (lambda doc: [np.zeros((4, 8, 8, 3), np.uint8)], "takes pictures, not ndarray"),
        (lambda doc: ["/nowhere/clip.mp4"], "/nowhere/clip.mp4"),
    ],
)
def test_other_objects_than_pictures_are_refused_with_one_line(
    visuals: Callable[[Mapping[str, Any]], Any], line: str
) -> None:
    with pytest.raises(SampleError) as error:
        found(documents([file(JPEG)]), visuals)
    assert line in str(error.value)


# --- answers of the scripted model --------------------------------------------------------------


PICTURES = documents([file(JPEG)] * 40)
QUESTIONS = ("what is the small number?", "what is the big number?", "which small sign?")


def questions(
    settings: LmmsSettings, texts: Sequence[str], **generation: Any
) -> list[LmmsQuestion]:
    asked_all = [requests(text, **generation)[0] for text in texts]
    return questions_of(asked_all, settings, print)


def load(question: LmmsQuestion) -> list[OriginalPicture]:
    return originals_of(question, PICTURES)


def answers(
    source: AnswerSource,
    to_ask: Sequence[LmmsQuestion],
    load: Callable[[LmmsQuestion], list[OriginalPicture]] = load,
) -> list[CostedAnswer | SampleError]:
    return asyncio.run(answer_all(source, to_ask, load, lambda question, reply: None)).replies


def in_process(texts: Sequence[str] = QUESTIONS, **settings: Any) -> list[CostedAnswer]:
    settled = LmmsSettings(pretrained="fake", **settings)
    replies = answers(InProcess(settled), questions(settled, texts, until="\n\n"))
    assert not [reply for reply in replies if isinstance(reply, SampleError)]
    return [reply for reply in replies if isinstance(reply, CostedAnswer)]


async def over_service(
    texts: Sequence[str] = QUESTIONS,
    load: Callable[[LmmsQuestion], list[OriginalPicture]] = load,
    config: ServiceConfig | None = None,
    token: str | None = None,
    fit: str | None = None,
    **settings: Any,
) -> list[CostedAnswer | SampleError]:
    backend, preset = open_model("fake", max_new_tokens=64, fit=fit)
    engine = engine_of(backend, preset, None, {})
    async with running(Service(engine, config or ServiceConfig(port=0))) as url:
        settled = LmmsSettings(server=url, token=token, **settings)
        source = ServiceSource(settled)
        to_ask = questions(settled, texts, until="\n\n")
        return (await answer_all(source, to_ask, load, lambda question, reply: None)).replies


async def test_a_service_that_crops_pictures_causes_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await over_service(fit="pad")
    assert "fit" not in caplog.text
    await over_service(fit="crop")
    assert "the service: the fit is crop" in caplog.text


@pytest.mark.parametrize("policy", ["threshold", "always", "never"])
def test_the_policy_decides_what_is_retransmitted(policy: str) -> None:
    replies = in_process(policy=policy)
    small = [policy == "always" or (policy == "threshold" and "small" in q) for q in QUESTIONS]
    assert [reply.stage.name == "SECOND" for reply in replies] == small
    assert [reply.region_bytes > 0 for reply in replies] == small
    assert [reply.text.split()[0] == "second" for reply in replies] == small


def test_a_user_s_threshold_replaces_the_preset_s() -> None:
    stages = [reply.stage.name for reply in in_process(eta=3.0)]
    assert stages == ["FIRST"] * 3


def test_qualities_change_the_bytes() -> None:
    plain, low = in_process(policy="always"), in_process(policy="always", region_quality=5)
    for one, other in zip(plain, low, strict=True):
        assert one.view_bytes == other.view_bytes
        assert one.region_bytes > other.region_bytes
    for one, other in zip(plain, in_process(view_quality=5), strict=True):
        assert one.view_bytes > other.view_bytes


@pytest.mark.parametrize("policy", ["threshold", "always", "never"])
async def test_both_ways_answer_the_same_and_send_the_same_bytes(policy: str) -> None:
    there = await over_service(policy=policy)
    here = await asyncio.to_thread(in_process, policy=policy)
    for mine, theirs in zip(here, there, strict=True):
        assert isinstance(theirs, CostedAnswer)
        # On the wire, a time takes one to three bytes; in this process, three.
        assert 0 <= mine.bytes_down - theirs.bytes_down <= 8
        same = {"bytes_down": 0, "uncertainty": 0.0, "first_uncertainty": 0.0}
        assert asdict(mine) | same == asdict(theirs) | same
        assert mine.uncertainty == pytest.approx(theirs.uncertainty, abs=1e-6)
        assert mine.first_uncertainty == pytest.approx(theirs.first_uncertainty, abs=1e-6)


async def test_several_pictures_cost_the_same_both_ways() -> None:
    rows = documents([[file(JPEG), file(saved(photo(200, 300), "JPEG"))]] * 3, lists=True)

    def load_both(question: LmmsQuestion) -> list[OriginalPicture]:
        shown = LmmsQuestion(
            task="t", split="test", doc_id=0, text="", options=Options(),
            visuals=lambda doc: doc["image"],
        )  # fmt: skip
        return originals_of(shown, rows)

    there = await over_service(load=load_both)
    settled = LmmsSettings(pretrained="fake")
    to_ask = questions(settled, QUESTIONS, until="\n\n")
    here, _ = await answer_all(InProcess(settled), to_ask, load_both, lambda question, reply: None)
    single = await asyncio.to_thread(in_process)
    for mine, theirs, one in zip(here, there, single, strict=True):
        assert isinstance(mine, CostedAnswer)
        assert isinstance(theirs, CostedAnswer)
        assert (mine.bytes_up, mine.text, mine.box) == (theirs.bytes_up, theirs.text, theirs.box)
        assert mine.view_pixels == theirs.view_pixels == 2 * one.view_pixels
        assert mine.view_bytes == theirs.view_bytes > one.view_bytes


@pytest.mark.parametrize("way", ["here", "there"])
async def test_a_failed_question_does_not_affect_others(way: str) -> None:
    texts = [QUESTIONS[0], "<|reserved|> " * 3000, QUESTIONS[1]]
    if way == "there":
        replies = await over_service(texts)
    else:
        settled = LmmsSettings(pretrained="fake")
        source = InProcess(settled)
        replies, _ = await answer_all(source, questions(settled, texts), load, lambda *_: None)
    first, second, third = replies
    assert isinstance(first, CostedAnswer)
    assert isinstance(third, CostedAnswer)
    assert isinstance(second, SampleError)
    assert "\n" not in str(second)


def test_missing_pictures_fail_only_their_question() -> None:
    def load_or_not(question: LmmsQuestion) -> list[OriginalPicture]:
        if question.text == QUESTIONS[1]:
            raise OSError("the disk is gone")
        return load(question)

    settled = LmmsSettings(pretrained="fake")
    first, second, _ = answers(InProcess(settled), questions(settled, QUESTIONS), load_or_not)
    assert isinstance(first, CostedAnswer)
    assert str(second) == "the pictures: OSError: the disk is gone"


def test_many_failures_in_a_row_end_the_run() -> None:
    def load_some(question: LmmsQuestion) -> list[OriginalPicture]:
        if question.text == "?":
            raise SampleError("gone")
        return load(question)

    settled = LmmsSettings(pretrained="fake")
    many = questions(settled, ["?"] * (MOST_FAILURES_IN_A_ROW + 5))
    with pytest.raises(CollabError, match="questions failed in a row, the last: gone"):
        answers(InProcess(settled), [*questions(settled, QUESTIONS), *many], load_some)
    with pytest.raises(CollabError, match="3 questions failed in a row, the last: gone"):
        answers(InProcess(settled), many[:3], load_some)


class Recorded(InProcess):
    """Records how questions were grouped."""

    def __init__(self, settings: LmmsSettings) -> None:
        super().__init__(settings)
        self.groups: list[list[str]] = []

    async def open(self, to_ask: Sequence[LmmsQuestion]) -> None:
        await super().open(to_ask)
        self.group = 2

    async def answer(self, ready: Sequence[Any]) -> list[CostedAnswer | SampleError]:
        self.groups.append([one.question.text for one in ready])
        return await super().answer(ready)


def test_groups_hold_questions_of_one_task() -> None:
    settled = LmmsSettings(pretrained="fake")
    mixed = [requests(text, task=task)[0] for task, text in zip("uuuvv", "abcde", strict=True)]
    rows = {"u": PICTURES["t"], "v": PICTURES["t"]}
    source, done = Recorded(settled), list[str]()
    asyncio.run(
        answer_all(
            source,
            questions_of(mixed, settled, print),
            lambda question: originals_of(question, rows),
            lambda question, _: done.append(question.text),
        )
    )
    assert source.groups == [["a", "b"], ["c"], ["d", "e"]]
    assert done == list("abcde")


async def test_a_refused_connection_ends_the_run() -> None:
    with pytest.raises(AuthenticationError):
        await over_service(config=ServiceConfig(port=0, token="right"), token="wrong")


async def test_a_service_without_stop_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(name for name in connection.FEATURES if name != "stop")
    monkeypatch.setattr(connection, "FEATURES", known)
    with pytest.raises(ConfigError, match="lacks the feature stop, which the task needs"):
        await over_service()


def test_options_that_the_preset_does_not_take_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="k needs the aggregate first_k"):
        InProcess(LmmsSettings(pretrained="fake", k=3))
    with pytest.raises(ConfigError, match="eta"):
        InProcess(LmmsSettings(pretrained="fake", metric=Metric.MARGIN, eta=2.0))


# --- figures ------------------------------------------------------------------------------------


def test_figures_are_means_over_answered_questions() -> None:
    replies = in_process()
    parts = totals_of([*replies[:1], SampleError("no")]), totals_of(replies[1:])
    totals = sum_totals(parts)
    assert totals == totals_of([*replies, SampleError("no")])
    figures = totals.figures()
    assert figures["total_requests"] == 4
    assert figures["failed_rate"] == 1 / 4
    assert figures["retransmission_rate"] == 2 / 3
    assert figures["own_file_rate"] == 1.0
    assert figures["bytes_up"] == sum(reply.bytes_up for reply in replies) / 3
    assert figures["original_bytes"] == len(JPEG)
    assert figures["bytes_up_of_original"] == pytest.approx(figures["bytes_up"] / len(JPEG))
    pixels = [reply.region_pixels / reply.view_pixels for reply in replies]
    assert figures["additional_cost"] == pytest.approx(sum(pixels) / 3) != 0


def test_several_tasks_have_figures_of_their_own() -> None:
    replies = in_process()
    one, other = totals_of(replies[:1]), totals_of(replies[1:])
    figures = all_figures({"one": one, "other": other})
    assert figures.items() >= sum_totals([one, other]).figures().items()
    assert figures["one/bytes_up"] == replies[0].bytes_up
    assert figures["other/retransmission_rate"] == 1 / 2
    assert all_figures({"one": one}) == one.figures()


def test_the_parts_that_need_no_lmms_eval_import_none() -> None:
    folder = Path(__file__).resolve().parents[2] / "eval" / "lmms_plugin"
    users = {path.name for path in folder.glob("*.py") if "lmms_eval." in path.read_text("utf-8")}
    assert users == {"manifest.py", "model.py"}
