"""The privacy policy: what leaves, what is declined, and what is refused."""

from __future__ import annotations

import asyncio
import datetime
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_client.addresses import without_secrets
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from edge_client.privacy.areas import Rectangle
from edge_client.privacy.audit_log import AuditLog, RegionLine, ViewLine, read_log
from edge_client.privacy.guard import Guard, QuestionGuard
from edge_client.privacy.policy import CameraPolicy, Hours, PrivacyPolicy
from tests.edge_client.scripted import Peer, request, scripted
from tests.support.pictures import photo, saved
from vlm_collab.errors import ConfigError, PrivacyError, RemoteProtocolError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Decline, DeclineReason, Fallback, Region, Stage, Usage

NOON = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
FORM = (Size(50, 50), Fit.STRETCH, Codec.JPEG, 90)
REGION = (Size(80, 80), Codec.JPEG, 90)


class FakeClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime.datetime:
        return self.now

    def wait(self, **time: float) -> None:
        self.now += datetime.timedelta(**time)


def picture() -> Picture:
    return Picture.from_pil(photo(400, 300))


def view_leaves(question: QuestionGuard, size: int, of: Picture | None = None) -> None:
    question.record_views([(of or picture(), bytes(size))], *FORM)


def region_leaves(question: QuestionGuard, size: int, box: Box) -> DeclineReason | None:
    return question.region_leaves(picture(), bytes(size), box, *REGION)


def hiding(*edges: int, of: tuple[int, int] = (400, 300)) -> CameraPolicy:
    return CameraPolicy(hide=(Rectangle(*edges, Size(*of)),))


# The guard


def test_everything_may_leave_without_a_policy():
    question = Guard(CameraPolicy()).question("why?")
    question.begin()
    one = picture()
    assert Guard(CameraPolicy()).masked(one) is one
    assert question.may_send(one, Box(0, 0, 400, 300)) is None
    view_leaves(question, 10**9)
    assert region_leaves(question, 10**9, Box(0, 0, 400, 300)) is None


@pytest.mark.parametrize(
    ("share", "box", "reason"),
    [
        (0.25, Box(0, 0, 200, 150), None),
        (0.25, Box(0, 0, 200, 151), DeclineReason.LIMIT),
        (1.0, Box(0, 0, 400, 300), None),
        (0.0, Box(0, 0, 1, 1), DeclineReason.LIMIT),
    ],
)
def test_max_region_share_limits_regions(share, box, reason):
    question = Guard(CameraPolicy(max_region_share=share)).question("why?")
    assert question.may_send(picture(), box) is reason


def test_regions_are_counted_per_question_over_all_pictures():
    guard = Guard(CameraPolicy(max_regions_per_question=2))
    question, one, other = guard.question("why?"), picture(), picture()
    corner, middle = Box(0, 0, 9, 9), Box(100, 100, 120, 120)
    for image, box in ((one, corner), (other, corner)):
        assert question.may_send(image, box) is None
        assert question.region_leaves(image, b"jpeg", box, *REGION) is None
    assert question.may_send(one, middle) is DeclineReason.LIMIT
    # The same region again, as after a lost link, does not count.
    assert question.may_send(other, corner) is None
    assert guard.question("and?").may_send(one, middle) is None


def test_a_completely_hidden_region_is_declined():
    guard = Guard(
        CameraPolicy(
            hide=(
                Rectangle(0, 0, 100, 60, Size(400, 300)),
                Rectangle(0, 40, 100, 100, Size(400, 300)),
            )
        )
    )
    masked = guard.masked(picture())
    question = guard.question("why?")
    assert question.may_send(masked, Box(10, 10, 100, 100)) is DeclineReason.PRIVACY
    assert question.may_send(masked, Box(10, 10, 101, 100)) is None
    assert question.may_send(masked, Box(10, 10, 100, 101)) is None


def test_the_same_picture_gets_the_same_masked_one():
    guard, one = Guard(hiding(0, 0, 50, 50)), picture()
    assert guard.masked(one) is guard.masked(one) is not one
    assert guard.masked(one).hidden == (Box(0, 0, 50, 50),)
    assert guard.masked(picture()) is not guard.masked(one)


def test_a_masked_file_stays_masked_when_it_is_opened_again():
    data = saved(photo(400, 300), "PNG")
    masked = Guard(hiding(0, 0, 200, 300)).masked(Picture.open(data))
    for _ in range(2):
        region = Image.open(
            io.BytesIO(masked.region(Box(0, 0, 400, 300), Size(400, 300), Codec.PNG, 1))
        )
        assert region.crop((0, 0, 200, 300)).getbbox() is None
        assert region.getbbox() is not None


def test_the_byte_limit_holds_for_any_hour():
    clock = FakeClock()
    guard = Guard(CameraPolicy(max_bytes_per_hour=1000), clock=clock)
    question = guard.question("why?")
    view_leaves(question, 600)
    clock.wait(minutes=30)
    with pytest.raises(PrivacyError, match="1000 bytes an hour; 600 were sent, and 401 more"):
        view_leaves(question, 401)
    assert region_leaves(question, 401, Box(0, 0, 9, 9)) is DeclineReason.LIMIT
    assert region_leaves(question, 400, Box(0, 0, 9, 9)) is None
    clock.wait(minutes=29, seconds=59)
    with pytest.raises(PrivacyError):
        view_leaves(question, 1)
    clock.wait(seconds=1)  # the first 600 are an hour old
    view_leaves(question, 600)
    with pytest.raises(PrivacyError):
        view_leaves(question, 1)


def test_several_views_leave_together_or_not_at_all(tmp_path):
    log = tmp_path / "audit.jsonl"
    guard = Guard(CameraPolicy(max_bytes_per_hour=1000), audit=AuditLog(log))
    with pytest.raises(PrivacyError):
        guard.question("why?").record_views([(picture(), bytes(501))] * 2, *FORM)
    assert log.read_bytes() == b""
    guard.question("why?").record_views([(picture(), bytes(500))] * 2, *FORM)
    assert len(read_log(log).images) == 2


def test_the_byte_count_survives_a_restart_and_is_shared(tmp_path):
    clock, log = FakeClock(), tmp_path / "audit.jsonl"

    def restarted(camera: str = "door") -> QuestionGuard:
        rules = CameraPolicy(name=camera, max_bytes_per_hour=1000)
        return Guard(rules, audit=AuditLog(log), clock=clock).question("why?")

    first, second = restarted(), restarted()
    image = picture()
    for _ in range(200):  # more than is read at once from the end of the log
        view_leaves(first, 5, image)
        clock.wait(seconds=1)
    for question in (first, second, restarted()):
        with pytest.raises(PrivacyError, match="1000 were sent"):
            view_leaves(question, 1)
    view_leaves(restarted("garden"), 1000)
    clock.wait(minutes=57, seconds=39)  # 60 of them are older than an hour
    for question in (second, restarted()):
        with pytest.raises(PrivacyError, match="700 were sent"):
            view_leaves(question, 301)
    view_leaves(restarted(), 300)


def moved(log: Path) -> None:
    log.rename(log.with_suffix(".old"))


def cut_short(log: Path) -> None:
    os.truncate(log, 0)


@pytest.mark.parametrize("rotate", [moved, cut_short])
@pytest.mark.parametrize("reads", [0, 1])
def test_rotating_the_log_does_not_reset_the_hour(rotate, reads, tmp_path):
    log = tmp_path / "audit.jsonl"
    policy = CameraPolicy(max_bytes_per_hour=1000, hide=hiding(0, 0, 50, 50).hide)
    guard = Guard(policy, audit=AuditLog(log))
    masked = guard.masked(picture())
    view_leaves(guard.question("why?"), 600, masked)
    for _ in range(reads):  # reads what was written before
        with pytest.raises(PrivacyError):
            view_leaves(guard.question("why?"), 600, masked)
    rotate(log)
    with pytest.raises(PrivacyError, match="600 were sent"):
        view_leaves(guard.question("why?"), 600, masked)
    view_leaves(guard.question("why?"), 300, masked)
    fresh = read_log(log)
    assert [image.bytes for image in fresh.images] == [300]
    assert fresh.hidden[fresh.images[0].hidden] == (Box(0, 0, 50, 50),)
    with pytest.raises(PrivacyError, match="900 were sent"):
        view_leaves(guard.question("why?"), 101, masked)


def test_each_image_counts_once_in_every_process(tmp_path):
    log = tmp_path / "audit.jsonl"
    policy = CameraPolicy(max_bytes_per_hour=1000)
    guard, other = (Guard(policy, audit=AuditLog(log)) for _ in range(2))
    for writer in (guard, other, other):
        view_leaves(writer.question("why?"), 100)
        assert region_leaves(writer.question("why?"), 50, Box(0, 0, 90, 9)) is None
    for _ in range(2):
        for writer in (guard, other, Guard(policy, audit=AuditLog(log))):
            with pytest.raises(PrivacyError, match="450 were sent"):
                view_leaves(writer.question("why?"), 551)


def test_counts_are_dropped_after_an_hour(tmp_path):
    clock = FakeClock()
    policy, log = CameraPolicy(max_bytes_per_hour=1000), AuditLog(tmp_path / "audit.jsonl")
    guard = Guard(policy, audit=log, clock=clock)
    for _ in range(3):
        view_leaves(guard.question("why?"), 600)
        moved(log.path)  # so that it is never read back
        clock.wait(hours=1)
    guard.check_bytes(1)
    assert guard._spent == []
    assert not guard._recent._own  # type: ignore[union-attr]


def test_without_a_limit_no_image_is_remembered(tmp_path):
    for audit in (None, AuditLog(tmp_path / "audit.jsonl")):
        guard = Guard(CameraPolicy(), audit=audit)
        view_leaves(guard.question("why?"), 300)
        assert guard._spent == []


def test_views_larger_than_the_policy_allows_do_not_leave(tmp_path):
    log = tmp_path / "audit.jsonl"
    guard = Guard(CameraPolicy(max_view_pixels=2499), audit=AuditLog(log))
    with pytest.raises(PrivacyError, match=r"2499 px.*50 x 50"):
        view_leaves(guard.question("why?"), 300)
    assert log.read_bytes() == b""
    view_leaves(Guard(CameraPolicy(max_view_pixels=2500)).question("why?"), 300)


def test_threads_do_not_spend_the_same_bytes_twice():
    guard = Guard(CameraPolicy(max_bytes_per_hour=1000))
    refused: list[PrivacyError] = []
    image = picture()

    def send() -> None:
        for _ in range(20):
            try:
                view_leaves(guard.question("why?"), 10, image)
            except PrivacyError as error:
                refused.append(error)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 60


def test_quiet_hours_may_begin_in_the_middle_of_a_question(tmp_path):
    clock = FakeClock()
    local = NOON.astimezone()
    minute = local.hour * 60 + local.minute
    quiet = Hours((minute + 1) % 1440, (minute + 3) % 1440)
    guard = Guard(CameraPolicy(quiet_hours=(quiet,)), clock=clock)
    question = guard.question("why?")
    question.begin()
    view_leaves(question, 10)
    clock.wait(minutes=1)
    with pytest.raises(PrivacyError, match=str(quiet)):
        question.begin()
    with pytest.raises(PrivacyError):
        view_leaves(question, 10)
    assert question.may_send(picture(), Box(0, 0, 9, 9)) is DeclineReason.PRIVACY
    assert region_leaves(question, 10, Box(0, 0, 9, 9)) is DeclineReason.PRIVACY
    clock.wait(minutes=2)
    question.begin()


def test_an_image_that_cannot_be_logged_does_not_leave(tmp_path):
    log = tmp_path / "audit.jsonl"
    guard = Guard(CameraPolicy(), audit=AuditLog(log))
    log.unlink()
    log.mkdir()
    with pytest.raises(PrivacyError, match="nothing is sent"):
        view_leaves(guard.question("why?"), 10)
    assert region_leaves(guard.question("why?"), 10, Box(0, 0, 9, 9)) is DeclineReason.PRIVACY


def test_secrets_in_an_address_are_not_stored():
    assert without_secrets("wss://me:word@host:8765/v1?token=abc") == "wss://host:8765/v1"
    assert without_secrets("ws://127.0.0.1:8765") == "ws://127.0.0.1:8765"


# In the client


async def request_region(peer: Peer, **changes: Any) -> Region | Decline:
    ask = await peer.next_ask()
    peer.session.request_region(request(ask.id, **changes))
    reply = await peer.next()
    assert isinstance(reply, Region | Decline)
    if isinstance(reply, Decline):
        peer.session.answer(ask.id, "first", Stage.FIRST, Fallback.DECLINED, 2.0, Usage())
        await peer.flush()
    else:
        await peer.answer(ask.id, "second", Stage.SECOND)
    return reply


PHOTO = saved(photo(1000, 800), "PNG")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (CameraPolicy(max_region_share=0.01), DeclineReason.LIMIT),
        (CameraPolicy(max_regions_per_question=0), DeclineReason.LIMIT),
        (CameraPolicy(max_bytes_per_hour=1500), DeclineReason.LIMIT),
        (hiding(0, 0, 600, 600, of=(1000, 800)), DeclineReason.PRIVACY),
        (CameraPolicy(), None),
    ],
)
async def test_a_declined_region_leaves_the_first_answer_marked(policy, reason, tmp_path):
    async def script(peer: Peer) -> None:
        await peer.greet()
        replies.append(await request_region(peer, codec=Codec.PNG))
        await peer.answer_all()

    replies: list[Region | Decline] = []
    log = tmp_path / "audit.jsonl"
    async with scripted(script) as server:
        async with EdgeClient(
            server.url, policy=PrivacyPolicy({"default": policy}), audit=log, view_quality=30
        ) as client:
            answer = await client.ask(PHOTO, "why?")
            assert answer.declined is reason
            assert answer.fallback is (Fallback.DECLINED if reason else Fallback.NONE)
            assert answer.refined is (reason is None)
            assert answer.text == ("second" if reason is None else "first")
            assert answer.box == Box(69, 44, 181, 156)
            assert (await client.ask(PHOTO, "and?")).text == "echo and?"
    (reply,) = replies
    assert (reply.reason if isinstance(reply, Decline) else None) is reason
    kinds = [type(image) for image in read_log(log).images]
    assert kinds == ([ViewLine] if reason else [ViewLine, RegionLine])


async def test_the_server_sees_no_hidden_pixel():
    async def script(peer: Peer) -> None:
        await peer.greet(codecs=(Codec.PNG,))
        ask = await peer.next_ask()
        images_sent.append(ask.view)
        peer.session.request_region(
            request(ask.id, codec=Codec.PNG, index=0, side_px=200, columns=2, rows=2)
        )
        reply = await peer.next()
        assert isinstance(reply, Region)
        images_sent.append(reply.image)
        await peer.answer(ask.id, "second", Stage.SECOND)
        ask = await peer.next_ask()
        assert ask.view is None  # a follow-up question on a masked picture sends no pixels
        await peer.answer(ask.id, "third")
        await peer.socket.wait_closed()

    images_sent: list[bytes | None] = []
    policy = PrivacyPolicy({"default": hiding(100, 0, 1000, 100, of=(1000, 800))})
    async with scripted(script) as server, EdgeClient(server.url, policy=policy) as client:
        answer = await client.ask(PHOTO, "why?")
        await client.ask(PHOTO, "and?")
    assert answer.box == Box(25, 0, 225, 200)
    view, region = (Image.open(io.BytesIO(data or b"")) for data in images_sent)
    assert view.crop((12, 0, 112, 14)).getbbox() is None
    assert view.crop((0, 0, 11, 112)).getextrema()[2][0] > 0
    assert region.size == (112, 112)
    assert region.crop((42, 0, 112, 56)).getbbox() is None
    assert region.crop((0, 0, 42, 56)).getextrema()[2][0] > 0


async def test_a_question_over_the_budget_sends_nothing_and_frees_its_slot(tmp_path):
    async def script(peer: Peer) -> None:
        await peer.greet(max_in_flight=1)
        questions.append((await peer.next_ask()).question)
        await peer.answer(1, "first")
        await peer.answer_all()

    questions: list[str] = []
    policy = PrivacyPolicy({"door": CameraPolicy(name="door", max_bytes_per_hour=6000)})
    small, large = (
        saved(photo(60, 60), "PNG"),
        saved(Image.effect_noise((300, 300), 90).convert("RGB"), "PNG"),
    )
    async with scripted(script) as server:
        async with EdgeClient(
            server.url, policy=policy, camera="door", audit=tmp_path / "log"
        ) as client:
            for _ in range(3):
                with pytest.raises(PrivacyError, match='camera "door"'):
                    await client.ask(large, "too much?")
            assert (await client.ask(small, "why?")).text == "first"
            assert questions == ["why?"]
            assert (await client.ask(small, "and?")).text == "echo and?"  # needs no bytes
    assert len(read_log(tmp_path / "log").images) == 1


async def test_a_server_gets_no_view_as_large_as_the_original(tmp_path):
    """With every other rule as strict as it can be."""

    async def script(peer: Peer) -> None:
        await peer.greet(view_width=2000, view_height=1500)
        await peer.socket.wait_closed()

    strict = CameraPolicy(max_region_share=0.01, max_regions_per_question=0)
    log = tmp_path / "audit.jsonl"
    options = {"policy": PrivacyPolicy({"default": strict}), "audit": log}
    async with scripted(script) as server:
        client = EdgeClient(server.url, **options)  # type: ignore[arg-type]
        with pytest.raises(RemoteProtocolError, match="2000 x 1500 px"):
            await client.ask(saved(photo(2000, 1500), "JPEG"), "why?")
        await client.close()
    assert log.read_bytes() == b""


@pytest.mark.parametrize("most", [112 * 112 - 1, 1])
async def test_the_policy_bounds_the_view_before_any_is_made(most, tmp_path, monkeypatch):
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.socket.wait_closed()

    view_sizes: list[Size] = []
    monkeypatch.setattr(Picture, "view", lambda self, side, *form: view_sizes.append(side))
    policy, log = PrivacyPolicy({"default": CameraPolicy(max_view_pixels=most)}), tmp_path / "log"
    async with scripted(script) as server:
        async with EdgeClient(server.url, policy=policy, audit=log) as client:
            for _ in range(2):
                with pytest.raises(PrivacyError, match=rf"{most} px.*112 x 112"):
                    await client.ask(PHOTO, "why?")
    assert view_sizes == []
    assert log.read_bytes() == b""


async def test_a_small_picture_is_enlarged_to_a_view_that_the_policy_allows(tmp_path):
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask = await peer.next_ask()
        sizes.append(Image.open(io.BytesIO(ask.view or b"")).size)
        await peer.answer(ask.id, "small")
        await peer.socket.wait_closed()

    sizes: list[tuple[int, int]] = []
    policy = PrivacyPolicy({"default": CameraPolicy(max_view_pixels=112 * 112)})
    async with scripted(script) as server, EdgeClient(server.url, policy=policy) as client:
        assert (await client.ask(saved(photo(40, 30), "PNG"), "why?")).text == "small"
    assert sizes == [(112, 112)]


async def test_quiet_hours_refuse_a_question_before_it_is_sent():
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.socket.wait_closed()

    policy = PrivacyPolicy({"default": CameraPolicy(quiet_hours=(Hours.parse("00:00-24:00"),))})
    async with scripted(script) as server, EdgeClient(server.url, policy=policy) as client:
        with pytest.raises(PrivacyError, match="00:00-24:00"):
            await client.ask(PHOTO, "why?")


async def test_quiet_hours_stop_a_question_that_waits():
    """This includes a question about a picture whose view the server has."""

    async def script(peer: Peer) -> None:
        await peer.greet(max_in_flight=1)
        await peer.answer((await peer.next_ask()).id, "first")
        await peer.answer_all()

    clock = FakeClock()
    start = NOON.astimezone() + datetime.timedelta(minutes=1)
    quiet = Hours.parse(f"{start:%H:%M}-{start + datetime.timedelta(hours=1):%H:%M}")
    policy = PrivacyPolicy({"default": CameraPolicy(quiet_hours=(quiet,))})
    async with scripted(script) as server, EdgeClient(server.url, policy=policy) as client:
        client._guard._clock = clock
        assert (await client.ask(PHOTO, "why?")).text == "first"
        link = client._keeper.current
        assert link is not None
        await link.slot()
        waiting = asyncio.create_task(client.ask(PHOTO, "and?"))
        while not link._slots._waiters:
            await asyncio.sleep(0.005)
        clock.wait(minutes=2)
        link.give_back()
        with pytest.raises(PrivacyError):
            await waiting
        clock.wait(hours=2)
        assert (await client.ask(PHOTO, "now?")).text == "echo now?"


async def test_each_view_of_several_pictures_is_logged(tmp_path):
    async def script(peer: Peer) -> None:
        await peer.greet()
        ask = await peer.next_ask()
        sent.extend([ask.view, *(more.view for more in ask.more)])
        await peer.answer(ask.id, "first")
        await peer.answer_all()

    sent: list[bytes | None] = []
    other = saved(photo(300, 200), "PNG")
    async with scripted(script) as server:
        async with EdgeClient(server.url, audit=tmp_path / "log") as client:
            await client.ask([PHOTO, other], "which?")
            await client.ask([PHOTO, other], "and?")
    images = read_log(tmp_path / "log").images
    assert [image.bytes for image in images] == [len(view or b"") for view in sent]
    assert [image.source_px for image in images] == [(1000, 800), (300, 200)]
    assert {image.question for image in images} == {"which?"}


def test_a_wrong_policy_or_log_is_an_error_before_connecting(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        EdgeClient(policy=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="audit log"):
        EdgeClient(audit=tmp_path)
    with pytest.raises(ConfigError, match='no camera "attic"'):
        EdgeClient(policy=PrivacyPolicy({"door": CameraPolicy()}), camera="attic")
