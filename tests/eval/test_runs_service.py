"""A run over a service, compared with the same run in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from edge_client.picture import Picture
from eval.analysis.records import Record
from eval.analysis.run import Run, open_run
from eval.runs.folder import FAILURES
from eval.runs.loading import ModelOptions
from eval.runs.loop import Share, run
from eval.runs.methods.over_service import OverService
from eval.runs.methods.two_stage import TwoStage
from eval.tasks import Sample, Task, open_task
from server_plugin.backends.fake import FakeBackend, Script
from server_plugin.backends.open import open_model
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import preset_named
from server_plugin.service import connection
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from tests.eval.test_runs_loop import Changed
from tests.support.pictures import saved
from vlm_collab.errors import ConfigError, LinkError

LIMIT = 9
SAME = (
    "id", "question", "truth", "true_box", "source_width", "original_bytes",
    "view_bytes", "region_bytes", "view_pixels", "region_pixels", "reference_bytes",
    "ask_bytes", "request_bytes", "reply_bytes",
    "first_text", "second_text", "first_score", "second_score", "first_ended", "second_ended",
    "box", "map_rows", "map_columns", "first_mflops", "first_input_tokens",
)  # fmt: skip


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    backend, preset = open_model("demo", device="cpu", dtype="float32")
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    try:
        async with running(service) as url:
            yield url
    finally:
        await backend.close()


async def both(folder: Path) -> tuple[Run, Run]:
    task, share = open_task("signs", limit=LIMIT), Share(session="a")
    here = TwoStage(task, ModelOptions(name="demo"))
    await run(here, task, folder / "here", share=share)
    async with serving() as url:
        there = OverService(task, url, None)
        await run(there, task, folder / "there", share=share)
    return open_run(folder / "here"), open_run(folder / "there")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    return asyncio.run(both(tmp_path_factory.mktemp("runs")))


def rows(runs: tuple[Run, Run]) -> list[tuple[Record, Record]]:
    return list(zip(*(run.records for run in runs), strict=True))


def test_both_runs_have_the_same_rows(runs: tuple[Run, Run]) -> None:
    for here, there in rows(runs):
        row = asdict(there)
        assert {name: row[name] for name in SAME} == {name: asdict(here)[name] for name in SAME}
        assert there.second_mflops == pytest.approx(here.second_mflops + here.look_mflops, abs=2)


def test_uncertainty_comes_from_the_answers_tokens(runs: tuple[Run, Run]) -> None:
    for here, there in rows(runs):
        assert there.first_min_entropy == pytest.approx(here.first_min_entropy, abs=1e-5)
        assert there.second_min_entropy == pytest.approx(here.second_min_entropy, abs=1e-5)
        assert there.first_entropy == there.first_margin == there.first_tokens == []


def test_the_map_is_what_crossed_the_wire(runs: tuple[Run, Run]) -> None:
    for here, there in rows(runs):
        peak = max(here.map)
        assert there.map == pytest.approx([value / peak for value in here.map], abs=0.51 / 255)


def test_answer_sizes_differ_only_by_their_times(runs: tuple[Run, Run]) -> None:
    # In one process, each of the four times counts three bytes; on the wire, one to three.
    for here, there in rows(runs):
        assert 0 <= here.answer_bytes - there.answer_bytes <= 8
        assert 0 <= here.first_answer_bytes - there.first_answer_bytes <= 8


def test_a_service_does_not_report_its_model_s_sizes(runs: tuple[Run, Run]) -> None:
    _, there = runs
    assert there.decoder is None
    with pytest.raises(ConfigError, match="did not record its model's preset"):
        _ = there.preset


class Smaller(Changed):
    """Pictures of 112 px (the view's size), of 240 px (all is one region), and of 1000 px."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, self._sized)

    def _sized(self, index: int, sample: Sample) -> Sample:
        def picture() -> bytes:
            side = (112, 240, 1000)[index % 3]
            whole = Picture.open(sample.picture()).decoded()
            return saved(whole.resize((side, side - index)), "PNG")

        return replace(sample, picture=picture, image_id=f"{sample.image_id}-{index}")


async def test_without_a_useful_region_both_runs_keep_the_first_answer(tmp_path: Path) -> None:
    task, share = Smaller(open_task("signs", limit=6)), Share(session="a")
    await run(TwoStage(task, ModelOptions(name="demo")), task, tmp_path / "here", share=share)
    async with serving() as url:
        await run(OverService(task, url, None), task, tmp_path / "there", share=share)
    here, there = (open_run(tmp_path / name).records for name in ("here", "there"))
    assert len(here) == len(there) == 6, "no sample fails"
    assert [record.sends_region for record in here] == [False, False, True] * 2
    for one, other in zip(here, there, strict=True):
        row = asdict(other)
        assert {name: row[name] for name in SAME} == {name: asdict(one)[name] for name in SAME}
        if not one.sends_region:
            assert (one.second_text, one.second_score) == (one.first_text, one.first_score)
            assert one.second_tokens == one.first_tokens
            assert one.answer_bytes == one.first_answer_bytes
            costs = (one.region_pixels, one.request_bytes, one.reply_bytes, one.second_mflops)
            assert (costs, one.box, one.map) == ((0, 0, 0, 0), [], [])
    # Pictures of 240 px need the search, and both runs count its cost.
    assert [bool(record.look_mflops) for record in here] == [False, True, True] * 2
    assert [bool(record.look_mflops) for record in there] == [False, True, False] * 2


@pytest.mark.parametrize("fit", ["pad", "crop"])
async def test_a_service_that_crops_pictures_causes_a_warning(
    fit: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend, preset = open_model("fake", fit=fit)
    service = Service(engine_of(backend, preset, None, {}), ServiceConfig(port=0))
    async with running(service) as url:
        method = OverService(open_task("signs", limit=1), url, None)
        await method.open()
        await method.close()
    assert ("the service: the fit is crop" in caplog.text) == (fit == "crop")


async def test_without_tokens_there_is_no_uncertainty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tuple(name for name in connection.FEATURES if name != "tokens")
    monkeypatch.setattr(connection, "FEATURES", known)
    task = open_task("signs", limit=2)
    async with serving() as url:
        await run(OverService(task, url, None), task, tmp_path, share=Share(session="a"))
    for record in open_run(tmp_path).records:
        assert record.first_min_entropy == record.second_min_entropy == []
        assert record.second_text


def test_a_service_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    task = open_task("signs", limit=2)

    async def ask_a_closed_service() -> None:
        async with serving() as url:
            pass
        await run(OverService(task, url, None), task, tmp_path, share=Share(session="a"))

    with pytest.raises(LinkError):
        asyncio.run(ask_a_closed_service())
    assert not list(tmp_path.iterdir())


async def test_a_second_stage_that_fails_is_a_failed_sample(tmp_path: Path) -> None:
    def play(question: str, view: str, region: str) -> Script:
        return Script(first="a", second="b", fail_second="purple" in question)

    task = open_task("signs", limit=6)
    purple = sum("purple" in task[index].question for index in range(6))
    assert 0 < purple < 6
    engine = engine_of(FakeBackend(play), preset_named("demo"), None, {})
    async with running(Service(engine, ServiceConfig(port=0))) as url:
        ended = await run(OverService(task, url, None), task, tmp_path, share=Share(session="a"))
    assert (ended.rows, ended.failed) == (6 - purple, purple)
    assert "SERVER_FAILED" in (tmp_path / FAILURES).read_text()
