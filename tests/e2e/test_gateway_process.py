"""`vlm-collab gateway` as a process, once with the demo model behind it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from edge_client.cli import main as cli
from eval.cli.demo import cases
from tests.e2e.common import SURE, UNSURE, photo
from tests.e2e.gateways import data_url, user_message
from tests.support.patience import PATIENCE_S
from tests.support.pictures import saved
from tests.support.process import serving

VLM_COLLAB = str(Path(sys.executable).with_name("vlm-collab"))


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A gateway process, and the JSON line that it prints when it is ready."""
    process = subprocess.Popen(
        [VLM_COLLAB, "gateway", "--port", "0", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen[str]) -> str:
    """Stop a process; returns its stderr and checks that it exits with 0."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return errors


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command; returns its exit status and output."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["gateway", "--port", "0", *arguments])
    output = capsys.readouterr()
    assert not output.out
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.err.removesuffix("\n")


def test_repeated_refusals_are_logged_once():
    arguments = ("--server", "ws://127.0.0.1:9", "--log-level", "info")
    with started(*arguments) as (process, own):
        root = str(own["url"]).removesuffix("/v1")
        for _ in range(5):
            with pytest.raises(InvalidStatus):
                connect(f"ws{root.removeprefix('http')}/v1/collab", origin="http://evil.example")
            refusal = httpx.get(f"{root}/readyz", headers={"Host": "evil.example"})
            assert refusal.status_code == 403
        lines = stopped(process).splitlines()
    assert len([line for line in lines if "was refused" in line]) == 1
    assert "Traceback" not in "".join(lines)


def test_the_demo_model_reads_what_is_too_small_for_its_view():
    """The same pictures and questions as `vlm-collab demo`, through the SDK."""
    with serving("demo") as (_, server), started("--server", str(server["url"])) as (process, own):
        assert own["model"] == server["model"]
        right = {False: 0, True: 0}
        with openai.OpenAI(base_url=own["url"], api_key="any") as client:
            for case in cases():
                content = Path(case.photo).read_bytes()
                reply = client.chat.completions.create(
                    model=own["model"], messages=[user_message(case.question, content)]
                )
                extra = reply.vlm_collab  # type: ignore[attr-defined]
                right[extra["refined"]] += reply.choices[0].message.content == case.truth
                assert extra["original_bytes"] == len(content)
                assert extra["bytes_up"] < len(content) / 2
                assert bool(extra["region_bytes"]) is extra["refined"]
                if extra["refined"]:
                    # The streamed answer is the same, without any of the first-stage answer.
                    stream = client.chat.completions.create(
                        model=own["model"],
                        messages=[user_message(case.question, content)],
                        stream=True,
                    )
                    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
                    assert text == reply.choices[0].message.content
        assert right[False]
        assert right[True]
        assert stopped(process) == ""


def test_the_examples_of_the_sdks_documentation_work():
    with serving("fake") as (_, server), started("--server", str(server["url"])) as (process, own):
        client = openai.OpenAI(base_url=own["url"], api_key="any")
        completion = client.chat.completions.create(
            model="fake",
            messages=[
                {"role": "developer", "content": "Talk like a pirate."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": SURE},
                        {
                            "type": "image_url",
                            "image_url": {"url": data_url(photo(1)), "detail": "high"},
                        },
                    ],
                },
            ],
        )
        assert completion.choices[0].message.content
        response = client.responses.create(
            model="fake",
            instructions="You are a coding assistant that talks like a pirate.",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": UNSURE},
                        {"type": "input_image", "image_url": data_url(photo(1))},  # type: ignore
                    ],
                }
            ],
        )
        assert response.output_text.startswith("second ")
        for event in client.responses.create(
            model="fake", previous_response_id=response.id, input="thanks", stream=True
        ):
            last = event
        assert last.type in ("response.completed", "response.incomplete")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="fake", messages=[user_message(SURE, photo(1))], n=2
            )
        client.close()
        assert stopped(process) == ""


def test_the_docs_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """The example of docs/gateway.md, unchanged."""
    page = Path(__file__).parents[2].joinpath("docs", "gateway.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "photo.jpg").write_bytes(photo(1))
    monkeypatch.chdir(tmp_path)
    with serving("fake") as (_, server), started("--server", str(server["url"])) as (_, own):
        exec(example.replace("http://127.0.0.1:8766/v1", own["url"]), {})
    answer, cost = capsys.readouterr().out.splitlines()
    assert answer.endswith("what number is on the red circle?")
    assert int(cost.split()[0]) < int(cost.split()[2]) == len(photo(1))


def test_the_log_contains_no_questions_and_no_secrets():
    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photo(2))

        def log_message(self, *_: object) -> None:
            pass

    with (
        HTTPServer(("127.0.0.1", 0), Camera) as camera,
        serving("fake", "--token", "secret-token") as (_, server),
    ):
        threading.Thread(target=camera.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{camera.server_port}"
        arguments = ("--server", str(server["url"]), "--token", "secret-token")
        with started(*arguments, "--log-level", "debug", "--allow-host", host) as (process, own):
            with openai.OpenAI(base_url=own["url"], api_key="secret-key") as client:
                for picture in (photo(1), f"http://{host}/snap?password=secret-word"):
                    client.chat.completions.create(
                        model="fake", messages=[user_message(UNSURE, picture)]
                    )
                client.responses.create(model="fake", input=SURE)
            logged = stopped(process)
        camera.shutdown()
    assert logged.count("1 pictures, refined answer") == 2
    for words in ("secret", UNSURE, SURE, "small", "sky"):
        assert words not in logged


def test_key_and_token_may_come_from_files(tmp_path: Path):
    (tmp_path / "token").write_text("secret-token\n")
    (tmp_path / "key").write_text("secret-key\n")
    files = ("--token-file", str(tmp_path / "token"), "--api-key-file", str(tmp_path / "key"))
    with (
        serving("fake", *files[:2]) as (_, server),
        started("--server", str(server["url"]), *files) as (_, own),
    ):
        with openai.OpenAI(base_url=own["url"], api_key="secret-key") as client:
            reply = client.chat.completions.create(
                model="fake", messages=[user_message(SURE, photo(1))]
            )
            assert reply.choices[0].message.content
        with openai.OpenAI(base_url=own["url"], api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_a_gateway_starts_without_its_server():
    with started("--server", "ws://127.0.0.1:9", "--deadline", "0.3") as (process, own):
        assert own["model"] is None
        with openai.OpenAI(base_url=own["url"], api_key="any", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="no server answers"):
                client.models.list()
        assert stopped(process) == ""


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_the_gateway_warns_if_its_server_crops_pictures(fit: str):
    with serving("fake", "--fit", fit) as (_, server):
        with started("--server", str(server["url"])) as (process, own):
            assert httpx.get(str(own["url"]) + "/models").status_code == 200  # it is ready
            errors = stopped(process)
    assert ("about the server: the fit is crop" in errors) == (fit == "crop")
    assert len(errors.splitlines()) == (fit == "crop")


def test_max_megapixels_limits_pictures():
    wide = saved(Image.new("L", (1001, 1000)), "PNG")
    with serving("fake") as (_, server):
        arguments = ("--server", str(server["url"]), "--max-megapixels", "1")
        with (
            started(*arguments) as (_, own),
            openai.OpenAI(base_url=own["url"], api_key="any", max_retries=0) as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.chat.completions.create(model="fake", messages=[user_message(SURE, wide)])
    assert caught.value.code == "image_too_large"


def test_max_question_bytes_limits_questions_at_service_and_gateway():
    """The service allows 60 bytes of text, the gateway 50."""
    with (
        serving("fake", "--max-question-bytes", "60") as (_, server),
        started("--server", str(server["url"]), "--max-question-bytes", "50") as (_, own),
    ):
        for base, most in ((str(server["openai"]), 60), (own["url"], 50)):
            with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as client:
                for size in (most, most + 1):
                    messages: Any = [{"role": "user", "content": "?" * size}]
                    if size <= most:
                        assert client.chat.completions.create(
                            model="fake", messages=messages
                        ).choices
                        continue
                    with pytest.raises(openai.BadRequestError, match=f"more than {most}"):
                        client.chat.completions.create(model="fake", messages=messages)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--max-question-bytes", "0"], 2, "max-question-bytes"),
        (["--host", "0.0.0.0"], 2, "without an API key"),
        (["--server", "http://127.0.0.1"], 2, "is not a server address"),
        (["--port", "70000"], 2, "port"),
        (["--log-level", "loud"], 2, "log level"),
        (["--policy", "/no/such/file.yaml"], 2, "/no/such/file.yaml"),
        (["--ca-file", "/no/such/file.pem", "--server", "wss://127.0.0.1"], 2, "CA file"),
        (["--frobnicate"], 2, "frobnicate"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(
    arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
):
    exit_code, error = refused(capsys, *arguments)
    assert exit_code == code
    assert line in error
    assert "\n" not in error


def test_a_wrong_token_is_reported_at_the_start(capsys: pytest.CaptureFixture[str]):
    with serving("fake", "--token", "right") as (_, server):
        exit_code, error = refused(capsys, "--server", str(server["url"]), "--token", "wrong")
        assert exit_code == 5
        assert "token" in error
        assert "\n" not in error


def test_a_missing_extra_is_named():
    missing = "import sys; sys.modules['starlette'] = None; from edge_client.cli.main import main; "
    done = subprocess.run(
        [sys.executable, "-c", missing + "main(['gateway'])"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert 'pip install "vlm-collab[gateway]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
