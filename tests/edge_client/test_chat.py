"""`vlm-collab chat` in a terminal and in a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from PIL import Image

from tests.e2e.common import SURE, UNSURE, slow, world
from tests.edge_client.scripted import Peer, scripted, unused_url
from tests.support.clips import scene, shaken, write_clip
from tests.support.patience import PATIENCE_S
from tests.support.pictures import saved
from tests.support.process import serving
from tests.support.rtsp import RtspCamera, need_rtsp_server
from tests.support.web_camera import WebCamera, page, picture
from vlm_collab.protocol.messages import Ask, Cancel

ROOT = Path(__file__).resolve().parents[2]
CHAT = (sys.executable, "-m", "edge_client.cli.main", "chat")
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "120"}
WAIT_S = PATIENCE_S
ANSWERED = r"received [^\n]*\n> "


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("fake") as (_, ready):
        yield str(ready["url"])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    path.write_bytes(saved(scene(3), "JPEG", quality=95))
    return path


class Terminal:
    """The command in a pseudo-terminal, with simulated typing."""

    def __init__(self, *arguments: object, cwd: Path | None = None) -> None:
        command, *first = CHAT
        self.child = pexpect.spawn(
            command,
            [*first, *map(str, arguments)],
            env=ENVIRONMENT,
            encoding="utf-8",
            timeout=WAIT_S,
            dimensions=(50, 120),
            cwd=None if cwd is None else str(cwd),
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def type(self, line: str) -> None:
        self.child.sendline(line)

    def see(self, pattern: str) -> str:
        """Wait for a text; return everything up to it, without colours."""
        self.child.expect(pattern)
        return plain(self.child.before + self.child.after)

    def left(self) -> int:
        """Wait for its end; return the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def plain(text: str) -> str:
    """A terminal's text without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def piped(lines: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*CHAT, *map(str, arguments)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        **options,
    )
    assert "Traceback" not in done.stderr
    return done


# ---- on a terminal ---------------------------------------------------------------------------


def test_a_conversation_with_all_commands(server, file, tmp_path):
    with Terminal(file, "--server", server, cwd=tmp_path) as terminal:
        start = terminal.see("/help shows the commands")
        assert "picture 1, 640 x 480 px" in start
        terminal.type(UNSURE)
        output = terminal.see(ANSWERED)
        assert re.search(r"first answer +first .*uncertainty 2\.000", output)
        assert re.search(r"region +\d+ x \d+ px at", output)
        assert re.search(r"refined answer +second .*uncertainty 0\.010", output)

        terminal.type("/why")
        output = terminal.see("> $")
        raw = terminal.child.before
        assert "uncertainty     2.000 at first, 0.010 with the region" in output
        assert re.search(r"bytes sent +\d+: view [1-9]\d*, region [1-9]\d*, question", output)
        assert output.count("▀") == 48 * 18
        assert "\x1b[38;2;252;245;165" in raw  # the hottest cell
        assert "\x1b[38;2;90;220;255" in raw  # the box

        terminal.type("/save")
        output = terminal.see(r"saved as (region-\S+\.jpg), (\d+) bytes")
        with Image.open(next(tmp_path.glob("region-*.jpg"))) as crop:
            assert crop.size == (112, 112)
            assert not crop.getexif()

        # A follow-up: the server has the view, and the conversation is sent along.
        terminal.type("and what else?")
        output = terminal.see(ANSWERED)
        assert f"{UNSURE} second" in output

        terminal.type("/look")
        terminal.see("no new picture; keeping the last one")
        terminal.type("/nonsense")
        terminal.see("/nonsense is not a command; /help lists the commands")
        terminal.type("/help")
        output = terminal.see("/quit.*\n")
        for command in ("/look", "/why", "/save"):
            assert command in output
        terminal.type("/quit")
        assert terminal.left() == 0


def test_ctrl_c_drops_a_line_and_ctrl_d_quits(server, file):
    with Terminal(file, "--server", server) as terminal:
        terminal.see("> $")
        terminal.child.send("a question that is not")
        terminal.see("is not$")
        terminal.child.sendintr()
        terminal.see("> $")
        terminal.type(SURE)
        output = terminal.see(ANSWERED)
        assert "a question that" not in output
        terminal.child.sendeof()
        assert terminal.left() == 0


async def test_ctrl_c_cancels_a_question(file):
    async with world(slow(10.0)) as w:
        with Terminal(file, "--server", w.proxy.url) as terminal:
            await asyncio.to_thread(terminal.see, "> $")
            terminal.type(SURE)
            await w.proxy.until_passed(Ask)
            terminal.child.sendintr()
            await asyncio.to_thread(terminal.see, "cancelled")
            await w.proxy.until_passed(Cancel)
            await asyncio.to_thread(terminal.see, "> $")
            terminal.type("/quit")
            assert await asyncio.to_thread(terminal.left) == 0


async def test_an_answer_is_shown_as_it_grows(file):
    async with world(slow(1.0)) as w:
        with Terminal(file, "--server", w.proxy.url) as terminal:
            await asyncio.to_thread(terminal.see, "> $")
            terminal.type(UNSURE)
            grown = await asyncio.to_thread(terminal.see, ANSWERED)
        steps = re.findall(r"first answer +(.*)", grown)
        assert len({len(step.strip()) for step in steps}) > 2
        # Both answers are visible while the second one grows.
        assert re.search(
            r"first answer +first[^\n]*\n[^\n]*refined answer +second (?![^\n]*uncertainty)", grown
        )


async def test_a_question_waits_while_the_server_is_away(file):
    async with world() as w:
        with Terminal(file, "--server", w.proxy.url) as terminal:
            await asyncio.to_thread(terminal.see, "> $")
            w.proxy.refusing = True
            w.proxy.cut()
            terminal.type(UNSURE)
            await asyncio.to_thread(terminal.see, r"no server \(.*\); trying again")
            w.proxy.refusing = False
            output = await asyncio.to_thread(terminal.see, ANSWERED)
            assert "the server is back" in output
            assert "second " in output


async def test_a_chat_may_begin_before_its_server(file):
    async with world(connect=False) as w:
        w.proxy.refusing = True
        with Terminal(file, "--server", w.proxy.url) as terminal:
            await asyncio.to_thread(terminal.see, "questions wait until it answers")
            terminal.type(SURE)
            await asyncio.to_thread(terminal.see, "the question waits")
            w.proxy.refusing = False
            output = await asyncio.to_thread(terminal.see, ANSWERED)
            assert "first " in output


def test_look_takes_a_new_picture_of_a_camera(server, tmp_path):
    pictures = [shaken(scene(one), step) for one in (3, 4) for step in range(20)]
    clip = write_clip(tmp_path / "clip.mp4", pictures)
    with Terminal(clip, "--server", server) as terminal:
        terminal.see("picture [1-4], 640 x 480 px")
        terminal.type(SURE)
        one = re.search(r"first (\w+) what", terminal.see(ANSWERED))
        # A notice while somebody types: the typed text stays.
        terminal.child.send("/lo")
        terminal.see("the recording has ended")
        terminal.see("> /lo$")
        terminal.type("ok")
        terminal.see(r"picture (3\d|40), 640 x 480 px")
        terminal.type(SURE)
        other = re.search(r"first (\w+) what", terminal.see(ANSWERED))
        assert one is not None
        assert other is not None
        assert one[1] != other[1]


def test_an_unplugged_camera_is_reported_and_comes_back(server, tmp_path):
    need_rtsp_server()
    clip = write_clip(
        tmp_path / "clip.mp4", [shaken(scene(3), step) for step in range(100)], crf=30
    )
    with RtspCamera(clip) as camera, Terminal(camera.url, "--server", server) as terminal:
        terminal.see("picture \\d+, 640 x 480 px")
        terminal.see("> $")
        camera.unplug()
        terminal.see(f"{camera.url} is lost: [^\n]*; trying to get it back")
        # The last picture can still be asked about.
        terminal.type(SURE)
        terminal.see(ANSWERED)
        camera.plug_in()
        terminal.see("is back after")
        terminal.type("/look")
        terminal.see("picture \\d+, 640 x 480 px")
        terminal.type("/quit")
        assert terminal.left() == 0


def test_a_busy_camera_is_reported_and_comes_back(server):
    shows = [picture(saved(scene(one), "JPEG", quality=95)) for one in (3, 4)]
    with WebCamera(shows[0]) as camera, Terminal(camera.url, "--server", server) as terminal:
        terminal.see("picture \\d+, 640 x 480 px")
        terminal.see("> $")
        camera.do(page("Device Busy"))
        terminal.see("is lost: the response is text/html, not a JPEG, PNG or WebP picture; trying")
        terminal.type(SURE)
        terminal.see(ANSWERED)
        camera.do(shows[1])
        terminal.see("is back after")
        terminal.type("/look")
        terminal.see("picture \\d+, 640 x 480 px")
        terminal.type("/quit")
        assert terminal.left() == 0


# ---- in a pipe -------------------------------------------------------------------------------


def test_why_explains_that_a_small_picture_needs_no_region(server, tmp_path):
    small = tmp_path / "small.png"
    Image.new("RGB", (100, 80), (9, 99, 199)).save(small)
    done = piped(f"{UNSURE}\n/why\n", small, "--server", server)
    assert done.returncode == 0
    assert "the first one: no region would show more than the view does" in done.stdout
    assert "none was requested: it would show no more than the view does" in done.stdout
    assert "sure enough" not in done.stdout


def test_each_line_of_a_pipe_is_a_question(server, file, tmp_path):
    crop = tmp_path / "crop.jpg"
    done = piped(f"{UNSURE}\n\n/why\n/save {crop}\n{SURE}\n", file, "--server", server)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.count("\n  refined answer  second ") == 2  # the history is sent, too
    assert done.stdout.index(UNSURE) < done.stdout.index("+--")  # the map, in plain characters
    assert f"saved as {crop}" in done.stdout
    with Image.open(crop) as image:
        assert image.format == "JPEG"


async def test_an_empty_answer_is_shown_and_the_conversation_continues(file):
    async def script(peer: Peer) -> None:
        await peer.greet()
        for text in ("", "something"):
            await peer.answer((await peer.next_ask()).id, text)
        await peer.socket.wait_closed()

    async with scripted(script) as server:
        lines = "what?\nand now?\n"
        done = await asyncio.to_thread(piped, lines, file, "--server", server.url)
    assert done.returncode == 0
    assert re.search(r"answer +\(no text\)  uncertainty", done.stdout)
    assert re.search(r"answer +something  uncertainty", done.stdout)


def test_json_is_one_object_for_each_answer(server, file):
    done = piped(f"{UNSURE}\n/why\n/nothing\n<refuse>\n{SURE}", file, "--server", server, "--json")
    unsure, command, refused, sure = map(json.loads, done.stdout.splitlines())
    assert unsure["question"] == UNSURE
    assert unsure["photo"] == str(file)
    assert unsure["frame"] == 1
    assert unsure["refined"]
    assert len(unsure["map"]) == 8
    assert unsure["view_bytes"] > 0
    assert command["code"] == "CONFIG"
    assert refused["code"] == "BAD_QUESTION"
    assert refused["question"] == "<refuse>"
    assert sure["view_bytes"] == 0  # a follow-up costs no pixels
    assert done.returncode == 2  # exit code of the first failure


def test_a_line_of_invalid_text_is_refused_and_the_next_is_asked(server, file):
    done = subprocess.run(
        [*CHAT, str(file), "--server", server, "--json"],
        input=b"what \xff\xfe?\n" + SURE.encode() + b"\n",
        capture_output=True,
        timeout=PATIENCE_S,
    )
    refused, sure = map(json.loads, done.stdout.splitlines())
    assert refused["code"] == "QUESTION"
    assert sure["answer"].startswith("first")
    assert b"Traceback" not in done.stderr


async def test_a_policy_is_obeyed_and_images_are_logged(file, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("cameras:\n  door:\n    max_region_share: 0.001\n")
    audit = tmp_path / "audit.jsonl"
    async with world() as w:
        arguments = ("--server", w.proxy.url, "--policy", policy, "--camera", "door")
        done = await asyncio.to_thread(
            piped, f"{UNSURE}\n", file, *arguments, "--audit", audit, "--json"
        )
    answer = json.loads(done.stdout)
    assert answer["fallback"] == "declined"
    assert answer["region_bytes"] == 0
    assert len(audit.read_text().splitlines()) >= 1


def test_single_questions_have_no_history(server, file):
    done = piped(f"{UNSURE}\n{SURE}\n", file, "--server", server, "--json", "--single")
    _, sure = map(json.loads, done.stdout.splitlines())
    assert sure["answer"].startswith("first")
    assert UNSURE not in sure["answer"]


def test_fresh_takes_a_new_picture_for_every_question(server, tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(scene(3), "JPEG"))
    process = subprocess.Popen(
        [*CHAT, str(tmp_path), "--server", server, "--json", "--fresh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{SURE}\n")
    one = json.loads(process.stdout.readline())
    (tmp_path / "b.jpg").write_bytes(saved(scene(4), "JPEG"))
    process.stdin.write(f"{SURE}\n")
    other = json.loads(process.stdout.readline())
    process.communicate(timeout=WAIT_S)
    assert (one["frame"], other["frame"]) == (1, 2)
    assert other["photo"].endswith("b.jpg")
    assert one["answer"] != other["answer"]


async def test_in_a_pipe_an_absent_server_is_reported_after_the_deadline(file):
    url = await unused_url()
    done = await asyncio.to_thread(piped, "what?\n", file, "--server", url, "--deadline", 2)
    assert done.returncode == 4
    assert done.stdout.count("\n") <= 3
    assert "what?: cannot connect" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("nowhere.jpg",), 3, "nowhere.jpg: no such file or folder"),
        (("camera:98",), 3, "/dev/video98: No such file or directory"),
        (("gopher://x/y",), 2, "unknown kind of stream"),
        (("--always", "--never", "x"), 2, "--always and --never exclude each other"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(capsys, arguments, code, line):
    from edge_client.cli import main as cli

    with pytest.raises(SystemExit) as exit_info:
        cli.main(["chat", *arguments])
    output = capsys.readouterr()
    assert (exit_info.value.code, output.out) == (code, "")
    assert line in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("command", ["chat", "watch"])
def test_a_missing_extra_is_named(command, tmp_path):
    arguments = ["rtsp://127.0.0.1/x", *(["what?", "--every", "1"] if command == "watch" else [])]
    code = (
        "import sys; sys.modules['av'] = None\n"
        f"from edge_client.cli.main import main; main({[command, *arguments]})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last == f'vlm-collab {command} needs more packages: pip install "vlm-collab[camera]"'


def test_a_file_needs_no_extra(server, file):
    code = (
        "import sys; sys.modules['av'] = None; sys.modules['numpy'] = None\n"
        "from edge_client.cli.main import main\n"
        f"main(['chat', {str(file)!r}, '--server', {server!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="what?\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "answer" in done.stdout


# ---- a real model ----------------------------------------------------------------------------


def test_the_demo_model_reads_a_sign_that_a_camera_shows(tmp_path):
    pictures = ROOT / "demo/vlm_collab_demo/pictures"
    listed = json.loads((pictures / "pictures.json").read_text())["pictures"]
    one = next(picture for picture in listed if picture["file"] == "scene-3.jpg")
    assert one["role"] == "asks"
    with Image.open(pictures / one["file"]) as image:
        clip = write_clip(tmp_path / "clip.mp4", [image.convert("RGB")] * 10, crf=8)
    with serving() as (_, ready):
        done = piped(f"{one['question']}\n", clip, "--server", ready["url"], "--json")
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["refined"]
    assert answer["answer"] == one["truth"]
