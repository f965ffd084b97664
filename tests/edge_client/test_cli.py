"""The command line: output, exit codes, and no tracebacks."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from edge_client.answer import EdgeAnswer
from edge_client.cli import main as cli
from edge_client.cli import output as show
from edge_client.cli.errors import EXIT_CODES_HELP, error_name, exit_code
from edge_client.cli.printing import printable
from edge_client.picture import Picture
from server_plugin.service.runner import running
from tests.e2e.common import SURE, UNSURE, photo, slow, world
from tests.edge_client.scripted import Peer, replying, scripted, unused_url
from tests.support.patience import PATIENCE_S
from tests.support.wire import service
from vlm_collab import errors
from vlm_collab.errors import CollabError, ErrorCode, server_error
from vlm_collab.geometry import Box
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import Ask, Cancel, Error, Fallback, Stage, Usage


@pytest.fixture
def photo_file(tmp_path) -> str:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo(1))
    return str(file)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; return its exit code, stdout and stderr."""
    monkeypatch.delenv("VLM_COLLAB_TOKEN", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(list(arguments))
        output = capsys.readouterr()
        code = exit_info.value.code
        assert isinstance(code, int)
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return call


# ---- answers ---------------------------------------------------------------------------------


async def test_answers_are_printed_as_text_in_the_order_of_the_questions(run, photo_file):
    async with running(service()) as url:
        code, out, err = await asyncio.to_thread(
            run, "ask", photo_file, UNSURE, SURE, "--server", url, "--show-map"
        )
    assert (code, err) == (0, "")
    assert "first answer" in out
    assert "refined answer  second" in out
    assert "112 x 112 px at" in out
    assert "of 480 x 360" in out
    assert " kB (" in out
    assert "██" in out
    assert out.index(UNSURE) < out.index(SURE)


async def test_answers_are_printed_as_json_for_each_photo_and_question(run, photo_file, tmp_path):
    other = tmp_path / "other.jpg"
    other.write_bytes(photo(2))
    async with running(service()) as url:
        code, out, err = await asyncio.to_thread(
            run,
            "ask",
            photo_file,
            UNSURE,
            SURE,
            "-p",
            str(other),
            "--server",
            url,
            "--json",
            "--map",
        )
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(a["photo"], a["question"]) for a in answers] == [
        (file, question) for file in (photo_file, str(other)) for question in (UNSURE, SURE)
    ]
    unsure, sure = answers[:2]
    assert unsure["refined"]
    assert unsure["stage"] == "second"
    assert len(unsure["box"]) == 4
    assert len(unsure["map"]) == 8
    assert {len(row) for row in unsure["map"]} == {8}
    assert unsure["bytes_up"] == unsure["usage"]["bytes_up"]
    assert unsure["original_bytes"] == len(photo(1))
    assert sure["box"] is None
    assert sure["map"] is None
    assert sure["fallback"] == "none"


async def test_an_empty_answer_is_printed_as_no_text(run, photo_file):
    async def script(peer: Peer) -> None:
        await peer.greet()
        for text in ("", " \n", ""):
            await peer.answer((await peer.next_ask()).id, text)
        await peer.socket.wait_closed()

    async with scripted(script) as server:
        arguments = ("ask", photo_file, "why?", "--server", server.url)
        code, out, err = await asyncio.to_thread(run, *arguments[:3], "and?", *arguments[3:])
        assert (code, err) == (0, "")
        assert len(re.findall(r"  answer +\(no text\)  uncertainty 0\.100", out)) == 2
    async with scripted(script) as server:
        code, out, _ = await asyncio.to_thread(run, *arguments[:4], server.url, "--json")
        assert (code, json.loads(out)["answer"]) == (0, "")


def coloured(answer: EdgeAnswer, picture: Picture) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(show.history(answer, picture))
    return console.file.getvalue()


def test_the_refined_answer_has_no_colour_for_better(photo_file):
    """The value may rise in the second pass, which is good for a margin and bad for an entropy."""
    picture = Picture.open(photo_file)
    green = re.compile(r"\x1b\[(\d+;)*32m")
    for first, second in [(0.3, 0.9), (0.9, 0.3)]:
        refined = EdgeAnswer(
            text="a",
            stage=Stage.SECOND,
            fallback=Fallback.NONE,
            uncertainty=second,
            first_text="b",
            first_uncertainty=first,
            box=Box(0, 0, 100, 100),
            map=None,
            rows=4,
            columns=4,
            bytes_up=1,
            bytes_down=1,
            view_bytes=1,
            region_bytes=0,
            region=None,
            original_bytes=None,
            usage=Usage(),
            elapsed_s=1.0,
            model="m",
        )
        output = coloured(refined, picture)
        assert f"uncertainty {first:.3f}" in output
        assert f"uncertainty {second:.3f}" in output
        assert not green.search(output)


async def test_a_failed_question_does_not_fail_the_others(run, photo_file):
    async with running(service()) as url:
        arguments = ("ask", photo_file, "what is <refuse>?", SURE, "--server", url)
        code, out, _ = await asyncio.to_thread(run, *arguments, "--json")
        assert code == 7
        failed, answered = map(json.loads, out.splitlines())
        assert failed["code"] == "BAD_QUESTION"
        assert answered["answer"].startswith("first")
        code, out, err = await asyncio.to_thread(run, *arguments)
        assert code == 7
        # Answers on stdout; failures on stderr, with their question.
        assert "<refuse>" not in out
        assert SURE in out
        assert err.startswith(f"vlm-collab: {photo_file}: what is <refuse>?: ")
        assert err.count("\n") == 1


async def test_a_failed_question_is_reported_in_one_line(run, photo_file):
    async with running(service()) as url:
        code, out, err = await asyncio.to_thread(
            run, "ask", photo_file, "what is <refuse>?", "--server", url
        )
    assert (code, out, err.count("\n")) == (7, "", 1)
    assert err.startswith("vlm-collab: ")
    assert photo_file not in err


async def test_a_refusal_text_cannot_drive_the_terminal(run, photo_file):
    evil = "sorry \x1b[2J\x1b]0;title\x07 \x9b1A"

    async def refuse(peer: Peer) -> None:
        await peer.greet()
        while True:
            ask = await peer.next_ask()
            peer.session.error(ask.id, ErrorCode.INTERNAL, evil)
            await peer.flush()

    async def unfriendly(peer: Peer) -> None:
        await peer.next()
        await peer.socket.send(encode(Error(0, ErrorCode.BAD_ORDER, evil)))

    for script in (refuse, unfriendly):
        async with scripted(script) as server:
            for questions in ((SURE,), (SURE, UNSURE)):
                code, out, err = await asyncio.to_thread(
                    run, "ask", photo_file, *questions, "--server", server.url
                )
                assert code != 0
                assert "sorry" in err
                assert all(c.isprintable() or c == "\n" for c in out + err)


def test_failures_do_not_disturb_the_growing_answers(monkeypatch, capsys, photo_file):
    monkeypatch.setattr(show, "Console", partial(Console, force_terminal=True))
    picture = Picture.open(photo_file)
    with show.Terminal(show_map=False, several=True) as screen:
        take = screen.sink(1, picture, SURE)
        assert take is not None
        screen.show(0, picture, UNSURE, server_error(ErrorCode.BUSY, "full", None))
        take(Stage.FIRST, "growing")
        screen._live.refresh()
    out, err = capsys.readouterr()
    assert err == f"vlm-collab: {photo_file}: {UNSURE}: full\n"
    assert "growing" in out
    assert "full" not in out


async def test_the_region_is_saved_as_it_was_sent(run, photo_file, tmp_path):
    """All but the top of the picture is hidden. The saved bytes are the logged ones."""
    file, log, policy = tmp_path / "crop.jpg", tmp_path / "audit.jsonl", tmp_path / "policy.yaml"
    policy.write_text("cameras: {default: {hide: [{px: [0, 100, 480, 360], of: [480, 360]}]}}")
    async with running(service()) as url:
        code, out, _ = await asyncio.to_thread(
            run,
            *("ask", photo_file, UNSURE, "--server", url, "--save-crop", str(file)),
            *("--policy", str(policy), "--audit", str(log)),
        )
    assert code == 0
    assert f"region saved as {file}\n" in out
    (sent,) = [line for line in map(json.loads, log.open()) if line["kind"] == "region"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sent["sha256"]
    (_, top, _, bottom) = sent["box"]
    saved = Image.open(file).convert("L")
    assert top < 100 < bottom
    assert saved.crop((0, 110 - top, *saved.size)).getextrema()[1] < 30
    assert saved.crop((0, 0, saved.width, 90 - top)).getextrema()[1] > 100


@pytest.mark.parametrize("extra", [("--never",), ("--policy", "keeps.yaml")])
async def test_no_region_is_saved_if_none_was_sent(run, photo_file, tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keeps.yaml").write_text("cameras: {default: {max_regions_per_question: 0}}")
    async with running(service()) as url:
        arguments = ("ask", photo_file, UNSURE, "--server", url, "--save-crop", "crop.jpg", *extra)
        code, out, _ = await asyncio.to_thread(run, *arguments)
    assert code == 0
    assert "no region was sent, so none was saved" in out
    assert "saved as" not in out
    assert not (tmp_path / "crop.jpg").exists()


async def test_the_region_is_saved_in_the_format_that_its_name_says(run, photo_file, tmp_path):
    file = tmp_path / "crop.png"
    async with running(service()) as url:
        code, out, _ = await asyncio.to_thread(
            run, "ask", photo_file, UNSURE, "--server", url, "--save-crop", str(file)
        )
        assert (code, "crop.png (it was sent as JPEG)" in out) == (0, True)
        saved = Image.open(file)
        assert (saved.format, saved.size) == ("PNG", (112, 112))
        code, out, _ = await asyncio.to_thread(
            run,
            "ask",
            photo_file,
            SURE,
            UNSURE,
            "--server",
            url,
            "--save-crop",
            str(file),
            "--json",
        )
    assert code == 0
    assert len(out.splitlines()) == 2
    assert (tmp_path / "crop-2.png").exists()
    assert not (tmp_path / "crop-1.png").exists()


async def test_options_reach_the_server(run, photo_file):
    async with running(service()) as url:
        for options, refined in [
            (["--never"], False),
            (["--eta", "99"], False),
            (["--codec", "png", "--quality", "10"], True),
        ]:
            code, out, _ = await asyncio.to_thread(
                run, "ask", photo_file, UNSURE, "--server", url, "--json", *options
            )
            assert (code, json.loads(out)["refined"]) == (0, refined)
        code, out, _ = await asyncio.to_thread(
            run, "ask", photo_file, SURE, "--server", url, "--json", "--always"
        )
        assert (code, json.loads(out)["refined"]) == (0, True)


# ---- wrong usage -----------------------------------------------------------------------------


def test_wrong_usage_is_reported_in_one_line(run, photo_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("no picture")
    for arguments, code, line in [
        (["ask", str(tmp_path / "none.jpg"), "why?"], 3, "no such file"),
        (["ask", str(tmp_path), "why?"], 3, "is a directory"),
        (["ask", str(text), "why?"], 3, "not a picture"),
        (["ask", photo_file, ""], 2, "the question is empty"),
        (["ask", photo_file], 2, "Missing argument"),
        (["ask"], 2, "Missing argument"),
        (["ask", photo_file, "why?", "--codec", "gif"], 2, "--codec"),
        (["ask", photo_file, "why?", "--quality", "0"], 2, "--quality"),
        (["ask", photo_file, "why?", "--deadline", "-1"], 2, "--deadline"),
        (["ask", photo_file, "why?", "--deadline", "soon"], 2, "--deadline"),
        (["ask", photo_file, "why?", "--deadline", "nan"], 2, "--deadline"),
        (["ask", photo_file, "why?", "--eta", "nan"], 2, "--eta"),
        (["ask", photo_file, "why?", "--eta", "inf"], 2, "--eta"),
        (["ask", photo_file, "why?", "--eta", "-3"], 2, "--eta"),
        (["ask", photo_file, "why?", "--always", "--never"], 2, "exclude each other"),
        (["ask", photo_file, "why?", "--server", "here"], 2, "is not a server address"),
        (["ask", photo_file, "why?", "--ca-file", "none.pem"], 2, "CA file"),
        (["ask", photo_file, "why?", "--save-crop", "crop.gif"], 2, "--save-crop"),
        (["ask", photo_file, "why?", "--save-crop", "no/such/crop.png"], 2, "no such directory"),
        (["ask", photo_file, "why?", "--nonsense"], 2, "--nonsense"),
        (["ask", photo_file, "why?", "--map", "map.png"], 2, "map.png is the name of a file"),
        (["ask", photo_file, "Other.JPG", "why?"], 2, "give more photos with --photo"),
        (["nonsense"], 2, "No such command"),
    ]:
        for extra in ([], ["--json"]):
            got, out, err = run(*arguments, *extra)
            assert got == code, arguments
            if extra:
                assert err == ""
                assert line in json.loads(out)["error"]
                assert json.loads(out)["code"].isupper()
            else:
                assert out == ""
                assert err.startswith("vlm-collab: ")
                assert line in err
                assert err.count("\n") == 1


async def test_a_missing_server_is_reported_in_one_line(run, photo_file):
    url = await unused_url()
    code, out, err = await asyncio.to_thread(run, "ask", photo_file, "why?", "--server", url)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "nothing listens there" in err
    async with replying(b"HTTP/1.1 404 Not Found\r\n\r\n") as url:
        code, _, err = await asyncio.to_thread(run, "ask", photo_file, "why?", "--server", url)
    assert (code, err.count("\n")) == (4, 1)


async def test_the_token_comes_from_option_file_or_environment(
    run, photo_file, monkeypatch, tmp_path
):
    async with running(service(token="s3cret")) as url:
        arguments = ("ask", photo_file, SURE, "--server", url)
        for extra in ((), ("--token", "wrong")):
            code, _, err = await asyncio.to_thread(run, *arguments, *extra)
            assert (code, err.count("\n")) == (5, 1)
            assert "token" in err
        assert (await asyncio.to_thread(run, *arguments, "--token", "s3cret"))[0] == 0
        file = tmp_path / "token"
        file.write_text("s3cret\n")
        in_file = ("--token-file", str(file))
        assert (await asyncio.to_thread(run, *arguments, *in_file))[0] == 0
        code, _, err = await asyncio.to_thread(run, *arguments, *in_file, "--token", "wrong")
        assert (code, err.count("\n")) == (2, 1)
        assert "exclude each other" in err
        monkeypatch.setenv("VLM_COLLAB_TOKEN", "wrong")
        assert (await asyncio.to_thread(run, *arguments, *in_file))[0] == 0
        monkeypatch.setenv("VLM_COLLAB_TOKEN", "s3cret")
        assert (await asyncio.to_thread(run, *arguments))[0] == 0


async def test_a_passed_deadline_has_its_own_exit_code(run, photo_file):
    async with running(service(slow(1.0))) as url:
        code, out, _ = await asyncio.to_thread(
            run, "ask", photo_file, SURE, "--server", url, "--deadline", "0.1", "--json"
        )
    assert code == 6
    assert json.loads(out)["code"] == "DEADLINE"


def test_every_error_has_a_documented_code():
    def kinds(kind: type[CollabError]) -> set[type[CollabError]]:
        return {kind}.union(*map(kinds, kind.__subclasses__()))

    for kind in kinds(CollabError):
        # Server errors are tested by code below; OpenAI's errors only go to HTTP clients.
        if issubclass(kind, errors.ServerError) or kind.__module__ == "vlm_collab.openai.errors":
            continue
        error = kind("a line")
        assert exit_code(error) in range(1, 9)
        assert error_name(error).isupper()
    for code in ErrorCode:
        error = server_error(code, "a line", None)
        assert (exit_code(error), error_name(error)) == (7, code.name)
    for code in range(8):
        assert f"{code} " in EXIT_CODES_HELP


# ---- the program -----------------------------------------------------------------------------


def program(*arguments: str, code: str = "", **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code + "from edge_client.cli.main import main; main()"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


def test_help_imports_no_command():
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy', 'server_plugin', 'eval',"
        " 'websockets', 'PIL'} & set(sys.modules))))\n"
    )
    for arguments in ([], ["--help"]):
        done = program(*arguments, code=code)
        assert done.returncode == 0, done.stderr
        for name in ("ask", "serve", "demo", "Exit codes"):
            assert name in done.stdout
        assert done.stdout.splitlines()[-1].endswith("[]"), done.stdout[-300:]


def test_version_is_printed():
    done = program("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vlm-collab 0.")


def test_every_help_documents_the_exit_codes():
    assert "interrupted" in program("ask", "--help").stdout


_HELP_OF = [
    *([name] for name in ("ask", "audit", "chat", "gateway", "watch", "serve", "demo", "flops")),
    *(["eval", name] for name in ("run", "sweep", "report")),
    *(["calibrate", name] for name in ("threshold", "layers")),
    ["eval"],
    ["calibrate"],
    [],
]


@pytest.mark.parametrize("command", _HELP_OF, ids=" ".join)
def test_no_help_shows_types_of_python(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = run(*command, "--help")
    assert code == 0
    options = re.findall(r"^│ +(?:\* +)?(--[^│]*)", out, re.MULTILINE)
    assert options
    for line in options:
        assert not re.search(r"<(?!=)|\blist\[|\b(str|int|float|bool|path|range)\b  ", line), line
    if command == ["ask"]:
        assert re.search(r"--photo +-p +TEXT ", out)
        assert re.search(r"--always {10,}Send a region", out)
        assert re.search(r"--quality +N \[1<=x<=100\] ", out)
        assert re.search(r"--codec +jpeg\|png\|webp ", out)


@pytest.mark.parametrize("missing", ["numpy", "starlette"])
def test_a_missing_extra_is_named(missing):
    block = f"import sys; sys.modules[{missing!r}] = None\n"
    done = program("serve", "fake", code=block)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == 'vlm-collab serve needs more packages: pip install "vlm-collab[server]"\n'


def test_a_command_that_is_not_installed_is_reported(monkeypatch, run):
    class Point:
        name = "demo"

        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'eval'", name="eval")

    monkeypatch.setattr(cli, "_extensions", lambda: {"demo": Point()})
    code, _, err = run("demo")
    assert code == 2
    assert err.startswith("vlm-collab demo is not part of this installation")


async def test_an_interrupt_cancels_the_question(photo_file):
    async with world(slow(5.0)) as w:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "edge_client.cli.main",
            "ask",
            photo_file,
            SURE,
            "--server",
            w.proxy.url,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A test run that a shell started in the background ignores this signal, and its
            # children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        await w.proxy.until_passed(Ask)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert (process.returncode, out, err) == (130, b"", b"vlm-collab: interrupted\n")
        assert w.proxy.passed[Cancel] == 1


async def test_closed_output_is_no_failure(photo_file):
    async with running(service()) as url:
        command = f"{sys.executable} -m edge_client.cli.main ask {photo_file} q1 q2 --server {url}"
        process = await asyncio.create_subprocess_shell(
            f"{command} --json | true", stderr=subprocess.PIPE
        )
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert b"Traceback" not in err


# ---- printed text ------------------------------------------------------------------------


def test_text_from_outside_cannot_drive_the_terminal():
    text = printable("fine \x1b[2J\x1b]0;title\x07 \u202e still\r\nhere\t!")
    assert all(c.isprintable() for c in text)
    assert "\x1b" not in text
    assert text.startswith("fine ")


def test_importing_the_package_is_quick_and_imports_nothing_heavy():
    code = (
        # CPU time, not wall time: the machine may be busy.
        "import sys, time; begin = time.process_time(); import edge_client;"
        "print(time.process_time() - begin);"
        "edge_client.EdgeClient, edge_client.Client, edge_client.ask, edge_client.Picture;"
        "print(sorted({'torch', 'numpy', 'typer', 'rich', 'server_plugin', 'eval'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.15


def test_all_exported_names_can_be_imported():
    import edge_client

    for name in edge_client.__all__:
        assert getattr(edge_client, name) is not None
        assert name in dir(edge_client)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = edge_client.nonsense
    assert Path(edge_client.__file__).with_name("py.typed").exists()
