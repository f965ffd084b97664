"""The audit log: its content, its robustness, and the command that shows it."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
import json
import os
import stat
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.cli import main as cli
from edge_client.client import EdgeClient
from edge_client.picture import Picture
from edge_client.privacy.areas import Rectangle
from edge_client.privacy.audit_log import (
    AuditLog,
    HiddenLine,
    RegionLine,
    ViewLine,
    parsed,
    read_log,
)
from edge_client.privacy.guard import Guard
from edge_client.privacy.policy import CameraPolicy, PrivacyPolicy
from server_plugin.service.runner import running
from tests.edge_client.scripted import Peer, request, scripted
from tests.support.pictures import difference, photo, saved, turned
from tests.support.wire import UNSURE, service
from vlm_collab.errors import ConfigError, PrivacyError
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.messages import Ask, Region, Stage

NOW = datetime.datetime(2026, 5, 1, 12, 30, tzinfo=datetime.UTC)
SIZE = Size(640, 480)
PHOTO = turned(photo(*SIZE), 6, "JPEG", quality=95)
HIDING = PrivacyPolicy({"door": CameraPolicy(name="door", hide=(Rectangle(0, 0, 160, 480, SIZE),))})


@pytest.fixture
def run(capsys):
    """Run a command line; return its exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert isinstance(exit_info.value.code, int)
        return exit_info.value.code, output.out, output.err

    return call


def view_line(**changes: object) -> ViewLine:
    fields = {
        "time": NOW,
        "camera": "door",
        "picture": "sha256:0",
        "name": "p.jpg",
        "source_px": SIZE,
        "box": Box(0, 0, *SIZE),
        "size_px": Size(50, 50),
        "codec": "JPEG",
        "quality": 90,
        "bytes": 100,
        "sha256": "00",
        "question": "why?",
        "server": "ws://host:1",
        "fit": "stretch",
    }
    return ViewLine(**{**fields, **changes})  # type: ignore[arg-type]


async def conversation(log: Path, *, fit: int = 0) -> tuple[list[bytes], str]:
    """Ask a question with a region; return the images that the server got, and its address."""

    async def script(peer: Peer) -> None:
        await peer.greet(fit=fit)
        ask = await peer.next_ask()
        assert isinstance(ask, Ask)
        peer.session.request_region(request(ask.id, index=27, side_px=160, target_width=120))
        region = await peer.next()
        assert isinstance(region, Region)
        got.extend([ask.view or b"", region.image])
        await peer.answer(ask.id, "second", Stage.SECOND)
        await peer.socket.wait_closed()

    got: list[bytes] = []
    async with scripted(script) as server:
        url = server.url.replace("ws://", "ws://127.0.0.1:1@", 0)
        options = {"policy": HIDING, "camera": "door", "audit": log, "token": "SECRET-TOKEN"}
        async with EdgeClient(url, **options) as client:  # type: ignore[arg-type]
            await client.ask(PHOTO, "what is\nthere? \N{SNOWMAN}")
        return got, server.url


async def test_every_image_that_left_is_in_the_log(tmp_path):
    log = tmp_path / "audit.jsonl"
    before = datetime.datetime.now(datetime.UTC)
    got, url = await conversation(log)
    read = read_log(log)
    view, region = read.images
    assert isinstance(view, ViewLine)
    assert isinstance(region, RegionLine)
    for line, data in zip(read.images, got, strict=True):
        assert (line.bytes, line.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert line.codec == "JPEG"
        assert Image.open(io.BytesIO(data)).size == line.size_px
        assert line.picture == f"sha256:{hashlib.sha256(PHOTO).hexdigest()}"
        assert line.source_px == SIZE
        assert (line.camera, line.server) == ("door", url)
        assert line.question == "what is\nthere? \N{SNOWMAN}"
        assert before <= line.time <= datetime.datetime.now(datetime.UTC)
        assert read.hidden[line.hidden] == (Box(0, 0, 160, 480),)
    assert (view.box, view.fit) == (Box(0, 0, *SIZE), "stretch")
    assert region.box.size == (160, 160)
    assert region.size_px == (120, 112)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text("utf-8")
    assert "SECRET-TOKEN" not in text
    assert len(text.splitlines()) == 3
    assert all(json.loads(line)["time"].endswith("Z") for line in text.splitlines())


async def test_an_image_is_in_the_log_before_it_leaves(tmp_path, monkeypatch):
    """The line exists when the server has the image. Without a line, no image is sent."""
    log = tmp_path / "audit.jsonl"

    async def script(peer: Peer) -> None:
        await peer.greet()
        ask = await peer.next_ask()
        listed.append(len(read_log(log).images))
        log.rename(tmp_path / "old")
        log.mkdir()
        peer.session.request_region(request(ask.id))
        replies.append(await peer.next())
        await peer.answer(ask.id, "first")
        await peer.socket.wait_closed()

    listed: list[int] = []
    replies: list[object] = []
    async with scripted(script) as server, EdgeClient(server.url, audit=log) as client:
        answer = await client.ask(PHOTO, "why?")
        assert listed == [1]
        assert not any(isinstance(reply, Region) for reply in replies)
        assert answer.text == "first"
        with pytest.raises(PrivacyError, match="nothing is sent"):
            await client.ask(saved(photo(90, 90), "PNG"), "why?")


def test_the_first_entry_after_a_crash_starts_a_new_line(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write(view_line(question="one"))
    log.write(view_line(question="two"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    AuditLog(path).write(view_line(question="three"))
    read = read_log(path)
    assert [line.question for line in read.images] == ["one", "three"]
    assert read.broken == 1
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_cut_last_line_is_skipped(cut, tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditLog(path).write(view_line())
    first = path.read_bytes()
    path.write_bytes(first + first[:cut])
    read = read_log(path)
    assert (len(read.images), read.broken) == (1, 1)


def test_black_areas_are_written_again_when_their_line_is_gone(tmp_path):
    """After `logrotate` with `copytruncate`, a shell's `>`, or moving the file away."""
    path, boxes = tmp_path / "audit.jsonl", (Box(0, 0, 160, 480),)
    log, other = AuditLog(path), AuditLog(path)

    def writes(writer: AuditLog) -> None:
        writer.write(view_line(hidden=writer.hidden(boxes, NOW)))

    def hidden_line_count() -> int:
        read = read_log(path)
        assert all(read.hidden[line.hidden] == boxes for line in read.images)
        return sum(isinstance(parsed(raw), HiddenLine) for raw in path.read_bytes().splitlines())

    writes(log)
    writes(log)
    assert hidden_line_count() == 1
    os.truncate(path, 0)
    writes(log)
    assert hidden_line_count() == 1
    os.truncate(path, 0)
    for _ in range(9):  # until it is longer than before
        other.write(view_line())
    writes(log)
    assert b"hidden" in path.read_bytes().splitlines()[-2]
    path.rename(tmp_path / "old")
    writes(log)
    writes(log)
    assert hidden_line_count() == 1


def test_written_black_areas_are_not_kept_in_memory(tmp_path):
    """A mask has many boxes, and each picture size has its own."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)

    def write_areas() -> None:
        for size in range(20):
            log.hidden((Box(x, size, x + 5, size + 4) for x in range(2000)), NOW)

    tracemalloc.start()
    try:
        write_areas()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    written_bytes = path.stat().st_size
    assert kept_bytes < written_bytes / 20
    write_areas()  # the file still has the line, so nothing is written
    assert path.stat().st_size == written_bytes


def test_concurrent_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "audit.jsonl"

    def write(number: int) -> None:
        log = AuditLog(path)
        for _ in range(50):
            log.write(view_line(question=str(number) * 500))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = read_log(path)
    assert (len(read.images), read.broken) == (300, 0)


def test_a_new_log_is_private_and_an_old_one_keeps_its_mode(tmp_path):
    old = os.umask(0)
    try:
        AuditLog(tmp_path / "new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    (tmp_path / "old").touch(0o640)
    AuditLog(tmp_path / "old").write(view_line())
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


def test_fsync_is_called_if_it_is_on(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    AuditLog(tmp_path / "log").write(view_line())
    assert not synced
    AuditLog(tmp_path / "log", fsync=True).write(view_line())
    assert len(synced) == 1


def test_a_full_disk_stops_the_image(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "log")
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(PrivacyError, match="the disk is full"):
        log.write(view_line())


def test_fields_of_later_versions_are_ignored():
    line = json.dumps({"kind": "hidden", "time": "2026-05-01T12:30:00Z", "key": "k"})
    later = line[:-1] + ', "boxes": [[1, 2, 3, 4]], "later": {"a": [1]}}'
    assert parsed(later.encode()) == HiddenLine(time=NOW, key="k", boxes=(Box(1, 2, 3, 4),))
    assert parsed(line.encode()) is None
    assert parsed(b"\xff\xfe") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "2026-05-01T12:30:00"},
        {"time": "0001-01-01T00:00:00Z"},
        {"codec": "[/b]"},
        {"fit": "[/b]"},
        {"quality": 101},
        {"bytes": -1},
        {"size_px": [0, 112]},
        {"size_px": [10**6, 10**6]},
        {"source_px": [0, 0]},
        {"box": [5, 5, 2, 2]},
        {"box": [0, 0, 10**5, 10**5]},
    ],
)
def test_a_line_with_impossible_values_is_broken(changes, run, tmp_path):
    """Logs may come from other devices, and may have been changed."""
    path = tmp_path / "log"
    AuditLog(path).write(view_line())
    line = json.loads(path.read_bytes()) | changes
    with path.open("a") as file:
        print(json.dumps(line), file=file)
    read = read_log(path)
    assert (len(read.images), read.broken) == (1, 1)
    code, out, err = run("audit", path)
    assert code == 0
    assert out
    assert err.count("\n") == 1


def test_a_line_with_another_picture_size_is_reported(run, tmp_path):
    photo(60, 60).save(tmp_path / "p.png")
    digest = Picture.open(tmp_path / "p.png").digest
    AuditLog(tmp_path / "log").write(view_line(picture=digest, source_px=Size(4000, 3000)))
    files = ("--picture", tmp_path / "p.png", "--out", tmp_path / "s.png")
    code, _, err = run("audit", tmp_path / "log", *files)
    assert code == 2
    assert "was changed" in err


# The command


async def test_the_table_lists_images_and_totals(run, tmp_path):
    log = tmp_path / "audit.jsonl"
    await conversation(log)
    AuditLog(log).write(view_line(camera="evil \x1b[31m[red]cam", bytes=10))
    AuditLog(log).write(view_line(camera="door", bytes=20, time=NOW))
    with log.open("ab") as file:
        file.write(b'{"kind": "vi')
    code, out, err = await asyncio.to_thread(run, "audit", log)
    assert code == 0
    assert "\x1b" not in out
    assert "1 line is broken" in err
    for part in ("view", "160 x 160", "door", "[red]cam", "Totals"):
        assert part in out
    for line in read_log(log).images:
        assert line.sha256[:12] in out


async def test_json_lists_images_and_totals(run, tmp_path):
    log = tmp_path / "audit.jsonl"
    got, url = await conversation(log)
    for minutes, bytes in ((0, 20), (29, 30), (31, 40)):
        later = NOW + datetime.timedelta(minutes=minutes)
        AuditLog(log).write(view_line(camera="garden", bytes=bytes, time=later))
    code, out, err = await asyncio.to_thread(run, "audit", log, "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    images = [line for line in lines if line["kind"] != "total"]
    assert [line["kind"] for line in images] == ["view", "region", "view", "view", "view"]
    assert images[0]["hidden"] == [[0, 0, 160, 480]]
    assert (images[1]["server"], images[1]["bytes"]) == (url, len(got[1]))
    sums = {(line["camera"], line["hour"]): line for line in lines if line["kind"] == "total"}
    hours = {
        key[1]: (line["views"], line["regions"], line["bytes"])
        for key, line in sums.items()
        if key[0] == "garden"
    }
    assert list(hours.values()) == [(2, 0, 50), (1, 0, 40)]
    (door,) = (line for key, line in sums.items() if key[0] == "door")
    assert (door["views"], door["regions"]) == (1, 1)
    assert door["bytes"] == sum(map(len, got))
    code, out, _ = await asyncio.to_thread(run, "audit", log, "--json", "--camera", "garden")
    assert {json.loads(line)["camera"] for line in out.splitlines()} == {"garden"}


@pytest.mark.parametrize("fit", [0, 1, 2])
async def test_what_was_seen_is_drawn_over_the_original(fit, run, tmp_path):
    log, original, out = tmp_path / "audit.jsonl", tmp_path / "photo.jpg", tmp_path / "seen.png"
    original.write_bytes(PHOTO)
    got, _ = await conversation(log, fit=fit)
    code, stdout, err = await asyncio.to_thread(
        run, "audit", log, "--picture", original, "--out", out
    )
    assert (code, err) == (0, "")
    assert "2 images, 2 of them byte for byte" in stdout
    drawn = Image.open(out)
    assert drawn.size == SIZE
    upright = photo(*SIZE)
    view, region = read_log(log).images
    hidden = Box(0, 0, 160, 480)
    # Hidden areas are black wherever they would have been visible, apart from JPEG noise.
    assert np.asarray(drawn.crop((view.box.left, 20, 140, 460))).max() < 40
    # Region and view have the resolution in which they left, and both look like the original.
    sharp = Image.open(io.BytesIO(got[1])).resize(region.box.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(drawn.crop(region.box)), np.asarray(sharp))
    kept = (max(hidden.right + 20, view.box.left), 0, min(view.box.right, SIZE.width), 480)
    assert difference(drawn.crop(kept), upright.crop(kept)) < 6
    if fit == 2:  # crop: the server did not see the sides
        assert view.box == Box(80, 0, 560, 480)
        dimmed = drawn.crop((580, 20, 640, 460))
        assert np.asarray(dimmed).std(axis=2).max() == 0
        assert (
            np.asarray(dimmed).mean() < 0.5 * np.asarray(upright.crop((580, 20, 640, 460))).mean()
        )


async def test_images_with_unknown_black_areas_are_not_drawn(run, tmp_path):
    log, original, out = tmp_path / "audit.jsonl", tmp_path / "photo.jpg", tmp_path / "seen.png"
    original.write_bytes(PHOTO)
    await conversation(log)
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [raw for raw in lines if not isinstance(parsed(raw), HiddenLine)]
    log.write_bytes(b"".join(kept))
    drawing = ("--picture", original, "--out", out)
    code, stdout, _ = await asyncio.to_thread(run, "audit", log, *drawing)
    assert code == 0
    assert "0 images" in stdout
    assert "2 more" in stdout
    assert stdout.count("\n") == 1
    grey = np.asarray(Image.open(out).convert("RGB"))
    assert grey.std(axis=2).max() == 0  # only the dimmed original
    code, stdout, _ = await asyncio.to_thread(run, "audit", log, *drawing, "--json")
    assert json.loads(stdout) | {"out": ""} == {
        "out": "",
        "images": 0,
        "same_bytes": 0,
        "unknown": 2,
    }
    code, stdout, _ = await asyncio.to_thread(run, "audit", log)
    assert stdout.count("black areas unknown") == 2
    assert "some black" not in stdout
    code, stdout, _ = await asyncio.to_thread(run, "audit", log, "--json")
    images = [line for line in map(json.loads, stdout.splitlines()) if line["kind"] != "total"]
    assert [line["hidden"] for line in images] == [None, None]
    # A line from another log supplies one of the missing areas.
    hidden_line = next(raw for raw in lines if raw not in kept)
    AuditLog(log).write(view_line(hidden="0" * 16))
    log.write_bytes(log.read_bytes() + hidden_line)
    code, stdout, _ = await asyncio.to_thread(run, "audit", log, *drawing)
    assert "2 images, 2 of them byte for byte" in stdout
    assert "more" not in stdout


async def test_a_camera_frame_is_recognised_by_its_pixels(run, tmp_path):
    log, copy, out = tmp_path / "audit.jsonl", tmp_path / "frame.png", tmp_path / "seen.png"
    frame = photo(*SIZE)
    frame.save(copy)
    guard = Guard(HIDING.for_camera("door"), audit=AuditLog(log))
    masked = guard.masked(Picture.from_pil(frame))
    form = (Size(80, 60), Fit.STRETCH, Codec.WEBP, 80)
    guard.question("why?").record_views([(masked, masked.view(*form))], *form)
    code, stdout, _ = await asyncio.to_thread(run, "audit", log, "--picture", copy, "--out", out)
    assert code == 0
    assert "1 images, 1 of them" in stdout
    frame.putpixel((0, 0), (9, 9, 9))
    frame.save(copy)
    code, _, err = await asyncio.to_thread(run, "audit", log, "--picture", copy, "--out", out)
    assert code == 2
    assert "the log lists no image" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.jsonl"], "No such file"),
        (["."], "Is a directory"),
        (["noise"], "not an audit log"),
        (["log", "--picture", "p.png"], "--picture and --out together"),
        (["log", "--picture", "none.png", "--out", "s.png"], "none.png: no such file"),
        (["log", "--picture", "p.png", "--out", "s.tiff"], "must end in"),
        (["log", "--picture", "p.png", "--out", "s.png"], "lists no image"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(arguments, reason, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("noise").write_bytes(b"\x00\xff\n\n\x01")
    AuditLog("log").write(view_line())
    photo(60, 60).save("p.png")
    code, out, err = run("audit", *arguments)
    assert code in (2, 3)
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err


def test_an_empty_log_is_valid(run, tmp_path):
    AuditLog(tmp_path / "log")
    assert run("audit", tmp_path / "log", "--json") == (0, "", "")
    with pytest.raises(ConfigError):
        read_log(tmp_path)


# `vlm-collab ask`


async def test_ask_keeps_to_the_policy_and_writes_the_log(run, tmp_path):
    log, policy, file = tmp_path / "log", tmp_path / "policy.yaml", tmp_path / "photo.jpg"
    file.write_bytes(PHOTO)
    policy.write_text(
        "cameras:\n"
        "  default: {max_regions_per_question: 0}\n"
        "  open: {max_regions_per_question: 1}\n"
        "  asleep: {quiet_hours: ['00:00-24:00']}\n"
    )
    async with running(service()) as url:
        common = (
            "ask",
            file,
            UNSURE,
            "--server",
            url,
            "--policy",
            policy,
            "--audit",
            log,
            "--json",
        )
        results = {}
        for camera in ("default", "open", "asleep", None):
            which = ("--camera", camera) if camera else ()
            code, out, _ = await asyncio.to_thread(run, *common, *which)
            results[camera] = code, json.loads(out)
        _, people, _ = await asyncio.to_thread(run, *common[:-3])
    for camera in ("default", None):
        code, answer = results[camera]
        assert (code, answer["refined"], answer["fallback"]) == (0, False, "declined")
        assert (answer["region_bytes"], answer["declined"]) == (0, "limit")
    assert results["open"][1]["refined"] is True
    assert "not sent, it is over a limit" in people
    code, refused = results["asleep"]
    assert (code, refused["code"]) == (8, "PRIVACY")
    assert "00:00-24:00" in refused["error"]
    kinds = [(line.camera, isinstance(line, RegionLine)) for line in read_log(log).images]
    assert kinds == [("default", False), ("open", False), ("open", True), ("default", False)]
