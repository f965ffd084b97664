"""`vlm-collab watch`: one line for each question, even if camera or server fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pexpect
import pytest
from PIL import Image

from edge_client.cameras import open_camera
from edge_client.cli import watch
from edge_client.cli.watch import Watch
from edge_client.cli.watch_output import JsonLinesFile, WatchProgress
from edge_client.client import EdgeClient
from edge_client.retry import Retry
from server_plugin.service.runner import running
from tests.e2e.common import HASTY, World, slow, world
from tests.support.clips import scene, shaken, write_clip
from tests.support.patience import PATIENCE_S
from tests.support.pictures import saved
from tests.support.process import serving
from tests.support.proxy import What, Where
from tests.support.rtsp import RtspCamera, need_rtsp_server
from tests.support.web_camera import (
    WebCamera,
    page,
    part_of,
    picture,
    silence,
    silent_stream,
    stream,
)
from tests.support.wire import service
from vlm_collab.errors import AuthenticationError, ErrorCode
from vlm_collab.protocol.messages import Answer, Ask, Options, RegionRequest

UNSURE = "what is on the small sign?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Three seconds of a sign, then three of another, 10 frames a second."""
    pictures = [shaken(scene(one), step) for one in (3, 4) for step in range(30)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures)


def read(path: Path) -> list[dict]:
    """The lines of a file, all of them complete."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class Watching:
    """A watch on a source, inside the test's process."""

    def __init__(self, source: str, client: EdgeClient, out: Path, *, live=False, **how) -> None:
        self.out = out
        self.news: list[str] = []
        self.camera = open_camera(source, news=self.news.append, live=live)
        self.lines = JsonLinesFile(out)
        self.progress = WatchProgress(shared_terminal=True)
        settings = {"every": None, "seconds": None, "count": None, "deadline_s": 20.0}
        self.watch = Watch(
            self.camera,
            UNSURE,
            client,
            self.lines,
            self.progress,
            options=Options(),
            **{**settings, **how},
        )

    async def run(self) -> list[dict]:
        await asyncio.wait_for(self.watch.run(), 60)
        return read(self.out)

    async def until_lines(self, count: int) -> list[dict]:
        async with asyncio.timeout(PATIENCE_S):
            while len(lines := read(self.out)) < count:
                await asyncio.sleep(0.02)
        return lines


async def test_every_nth_frame_of_a_recording_is_asked_about(clip, tmp_path):
    async with world() as w:
        lines = await Watching(str(clip), w.client, tmp_path / "out", every=25).run()
    assert [line["frame"] for line in lines] == [1, 26, 51] or [
        abs(line["frame"] - due) < 4 for line, due in zip(lines, (1, 26, 51), strict=True)
    ] == [True] * 3
    for line in lines:
        assert line["question"] == UNSURE
        assert line["source"] == str(clip)
        assert line["answer"].startswith("second ")
        assert line["first_answer"].startswith("first ")
        assert (line["stage"], line["refined"], line["fallback"]) == ("second", True, "none")
        assert line["uncertainty"] < line["first_uncertainty"]
        assert len(line["box"]) == 4
        assert line["bytes_up"] > line["view_bytes"] + line["region_bytes"] > 0
        assert line["skipped"] == 0
        assert line["time"].endswith("+00:00")
        assert "error" not in line
    # The answers are about different pictures.
    assert len({line["answer"] for line in lines}) == 3


async def test_a_frame_every_n_seconds_of_a_recording_is_asked_about(clip, tmp_path):
    async with world() as w:
        lines = await Watching(str(clip), w.client, tmp_path / "out", seconds=2.0).run()
    assert [round(line["position_s"] / 2) for line in lines] == [0, 1, 2]


async def test_the_count_ends_the_watch(clip, tmp_path):
    async with world() as w:
        lines = await Watching(str(clip), w.client, tmp_path / "out", every=2, count=4).run()
    assert len(lines) == 4


async def test_frames_are_skipped_and_counted_if_the_server_is_slow(clip, tmp_path):
    async with world(slow(0.2)) as w:
        watching = Watching(str(clip), w.client, tmp_path / "out", live=True, every=1, count=7)
        lines = await watching.run()
    frames = [line["frame"] for line in lines]
    assert frames == sorted(set(frames))
    assert all(line["skipped"] > 0 for line in lines[1:])
    skipped = sum(line["skipped"] for line in lines)
    assert skipped == watching.progress.skipped
    # Every frame from the first question to the last was asked about or skipped.
    assert lines[0]["skipped"] == 0
    assert len(lines) + skipped == pytest.approx(frames[-1] - frames[0] + 1, abs=4)


async def test_intervals_are_skipped_if_the_server_is_slow(clip, tmp_path):
    async with world(slow(0.4)) as w:
        watching = Watching(str(clip), w.client, tmp_path / "out", live=True, seconds=0.2, count=4)
        lines = await watching.run()
    assert all(line["skipped"] >= 2 for line in lines[1:])


async def test_each_new_picture_in_a_folder_is_asked_about(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    async with world() as w:
        watching = Watching(str(folder), w.client, tmp_path / "out", every=1, count=3)
        running_watch = asyncio.create_task(watching.run())
        for number in range(3):
            (folder / f"{number}.jpg").write_bytes(saved(scene(number), "JPEG"))
            await watching.until_lines(number + 1)
        lines = await running_watch
    assert [line["frame"] for line in lines] == [1, 2, 3]
    assert len({line["answer"] for line in lines}) == 3
    assert lines[0]["original_bytes"] == len(saved(scene(0), "JPEG"))


async def test_a_failed_question_gives_a_line_and_the_watch_continues(clip, tmp_path):
    async with world(retry=Retry(attempts=1, reconnect_attempts=1)) as w:
        w.proxy.rule(Ask, Where.AFTER, What.CUT)
        w.proxy.refusing = True
        watching = Watching(str(clip), w.client, tmp_path / "out", every=20)
        running_watch = asyncio.create_task(watching.run())
        (first, *_) = await watching.until_lines(1)
        w.proxy.refusing = False
        lines = await running_watch
    assert first["frame"] == 1
    assert first["code"] == "LINK"
    assert first["error"]
    assert "answer" not in first
    assert [("answer" in line) for line in lines][-1]
    assert watching.progress.failed >= 1


async def test_a_watch_survives_a_restart_of_the_server(clip, tmp_path):
    async with world() as w, running(service(w.backend)) as other:
        w.proxy.rule(RegionRequest, Where.BEFORE, What.CUT)
        watching = Watching(str(clip), w.client, tmp_path / "out", every=20)
        w.proxy.retarget(other)
        lines = await watching.run()
    assert len(lines) == 3
    assert all(line["refined"] for line in lines)


async def test_a_watch_may_start_before_its_server(clip, tmp_path):
    async with world(connect=False, retry=HASTY) as w:
        w.proxy.refusing = True
        watching = Watching(
            str(clip), w.client, tmp_path / "out", live=True, every=1, deadline_s=1.0
        )
        running_watch = asyncio.create_task(watching.run())
        await watching.until_lines(1)
        w.proxy.refusing = False
        await w.proxy.until_passed(Answer, 2)
        running_watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running_watch
        lines = read(watching.out)
    assert "error" in lines[0]
    assert "answer" in lines[-1]


async def test_a_wrong_token_ends_the_watch_at_once(clip, tmp_path):
    async with running(service(token="right")) as url:
        client = EdgeClient(url, token="wrong", retry=HASTY)
        with pytest.raises(AuthenticationError):
            await Watching(str(clip), client, tmp_path / "out", every=1).run()
    assert read(tmp_path / "out") == []


async def test_a_refused_question_has_the_servers_error_code(clip, tmp_path):
    async with world() as w:
        watching = Watching(str(clip), w.client, tmp_path / "out", every=50)
        watching.watch._question = "what is <refuse>?"
        lines = await watching.run()
    assert [line["code"] for line in lines] == [ErrorCode.BAD_QUESTION.name] * 2


async def test_an_unplugged_camera_gives_one_line_and_is_reopened(clip, tmp_path, monkeypatch):
    need_rtsp_server()
    monkeypatch.setattr(watch, "_SILENCE_S", 0.3)
    async with world() as w:
        with RtspCamera(clip) as camera:
            watching = Watching(camera.url, w.client, tmp_path / "out", every=5)
            running_watch = asyncio.create_task(watching.run())
            await watching.until_lines(2)
            camera.unplug()
            async with asyncio.timeout(PATIENCE_S):
                while not any("error" in line for line in read(watching.out)):
                    await asyncio.sleep(0.02)
            lost = len(read(watching.out))
            camera.plug_in()
            lines = await watching.until_lines(lost + 2)
            running_watch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running_watch
    errors = [line for line in lines if "error" in line]
    assert [(line["frame"], line["code"]) for line in errors] == [(None, "IMAGE")]
    assert "is lost" in errors[0]["error"]
    assert "answer" in lines[-1]


async def test_a_camera_without_pictures_gives_one_line_after_five_seconds(tmp_path):
    """All kinds of trouble at the same time, since each takes five seconds."""
    good, other = (saved(scene(one), "JPEG", quality=95) for one in (3, 4))
    part, gone = len(good) // 3, "is lost: "
    kinds = {
        "busy": (picture, page("Device Busy"), f"{gone}the response is text/html, not a JPEG"),
        "half": (
            picture,
            part_of(good, part, sized=False),
            f"{gone}a broken JPEG picture",
        ),
        "short": (picture, part_of(good, part, sized=True), f"{gone}.* was cut off"),
        "silent": (picture, silence(), r"no picture for \d+ s; its web server does not answer"),
        "stuck": (picture, silence(good[:part]), r"no picture for \d+ s; its web server does not"),
        "black": (picture, picture(saved(Image.new("RGB", (640, 480)), "JPEG")), "is blank"),
        "stream, busy": (stream, page("Device Busy"), gone),
        "stream, half": (stream, stream(good[:part]), "only damaged"),
        "stream, silent": (stream, silent_stream(), f"{gone}|no picture for"),
    }

    async def watched(w: World, name: str) -> None:
        serve, instead, reason = kinds[name]
        with WebCamera(serve(good)) as camera:
            client = EdgeClient(w.proxy.url, retry=HASTY)
            # Frames of streams are counted, good or not.
            watching = Watching(
                camera.url, client, tmp_path / name, live=True, seconds=0.5, deadline_s=60.0
            )
            task = asyncio.create_task(watching.watch.run())
            await watching.until_lines(2)
            camera.do(instead)
            errors: list[dict] = []
            async with asyncio.timeout(PATIENCE_S):
                while not errors:
                    await asyncio.sleep(0.05)
                    errors = [line for line in read(watching.out) if "error" in line]
            camera.do(serve(other))
            lines = len(read(watching.out))
            last = (await watching.until_lines(lines + 2))[-1]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        lines = read(watching.out)
        [lost] = [line for line in lines if "error" in line]
        assert (lost["frame"], lost["code"]) == (None, "IMAGE")
        assert re.search(reason, lost["error"]), (name, lost["error"])
        before = lines[lines.index(lost) - 1]
        took = datetime.fromisoformat(lost["time"]) - datetime.fromisoformat(before["time"])
        assert 4 < took.total_seconds() < 9, (name, took)
        assert "answer" in last

    async with world() as w:
        await asyncio.gather(*(watched(w, name) for name in kinds))


async def test_a_camera_that_hangs_gives_one_line(clip, tmp_path, monkeypatch):
    need_rtsp_server()
    async with world() as w:
        with RtspCamera(clip) as camera:
            watching = Watching(camera.url, w.client, tmp_path / "out", every=5)
            running_watch = asyncio.create_task(watching.run())
            await watching.until_lines(2)
            camera.freeze()
            async with asyncio.timeout(PATIENCE_S):
                while not any("error" in line for line in read(watching.out)):
                    await asyncio.sleep(0.02)
            lost = len(read(watching.out))
            camera.thaw()
            lines = await watching.until_lines(lost + 1)
            running_watch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running_watch
    [error] = [line for line in lines if "error" in line]
    assert re.search(r"no picture for \d+ s; it sends nothing", error["error"])
    assert "answer" in lines[-1]


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("fake") as (_, ready):
        yield str(ready["url"])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edge_client.cli.main", "watch", *map(str, arguments)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_watch_with_complete_lines(clip, tmp_path, server, number):
    out = tmp_path / "out.jsonl"
    out.write_text('{"torn": ')  # a line cut off by a power failure
    process = subprocess.Popen(
        command(clip, UNSURE, "--every", 1, "--live", "--server", server, "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    while out.read_text().count("\n") < 4 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert output == ""
    assert "Traceback" not in errors
    torn, *lines = out.read_text().split("\n")[:-1]
    assert torn == '{"torn": '
    assert all(json.loads(line)["refined"] for line in lines)
    count = len(lines)
    assert errors.endswith(f"{count} asked, 0 failed, {sum_skipped(lines)} skipped\n")


def sum_skipped(lines: list[str]) -> int:
    return sum(json.loads(line)["skipped"] for line in lines)


def test_a_terminal_shows_the_progress(clip, tmp_path, server):
    out = tmp_path / "out.jsonl"
    program, *arguments = command(clip, UNSURE, "--every", 15, "--server", server, "--out", out)
    child = pexpect.spawn(
        program,
        arguments,
        encoding="utf-8",
        timeout=PATIENCE_S,
        dimensions=(24, 80),
        env={**os.environ, "TERM": "xterm"},
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before)
    assert output.endswith("4 asked, 0 failed, 0 skipped\r\n")
    assert re.search(r"picture \d+: 1 asked, 0 failed, 0 skipped: second [^\r\n]*…", output)
    assert len(read(out)) == 4


def test_a_policy_is_obeyed(clip, tmp_path, server):
    policy = tmp_path / "policy.yaml"
    policy.write_text("cameras:\n  default:\n    max_region_share: 0.001\n")
    audit = tmp_path / "audit.jsonl"
    arguments = ("--every", 30, "--server", server, "--policy", policy, "--audit", audit)
    done = subprocess.run(
        command(clip, UNSURE, *arguments), capture_output=True, text=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["fallback"] for line in lines] == ["declined", "declined"], done.stderr
    assert [line["region_bytes"] for line in lines] == [0, 0]
    assert audit.read_text().count("\n") >= 2


def test_closing_stdout_ends_the_watch(clip, server):
    words = " ".join(command(clip, "'small?'", "--every", 1, "--server", server))
    done = subprocess.run(
        f"{words} | head -n 2", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("\n") == 2
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "give either --every N (pictures) or --seconds S, to say how often to ask"),
        (("--every", "2", "--seconds", "2"), "give either --every N"),
        (("--seconds", "inf"), "--seconds must be a number above 0, not inf"),
        (("--every", "2", "--always", "--never"), "exclude each other"),
        (("--every", "2", "--out", "/nowhere/x"), "--out /nowhere/x: No such file or directory"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(capsys, clip, arguments, line):
    from edge_client.cli import main as cli

    with pytest.raises(SystemExit) as exit_info:
        cli.main(["watch", str(clip), "what?", *arguments])
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert line in output.err.splitlines()[-1]
    assert len(output.err.splitlines()) == 1
