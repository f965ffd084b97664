"""`vlm-collab serve` as a process: ready line, clean stop, one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
from importlib.util import find_spec
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from edge_client.cli.main import main
from edge_client.picture import Picture
from edge_client.sync import Client
from server_plugin.backends.open import open_model
from server_plugin.models.presets import config_folder
from tests.support.patience import PATIENCE_S
from tests.support.process import SERVE, serving
from tests.support.tiny_llava import rename_family, save_tiny_llava
from vlm_collab.errors import AuthenticationError, ConfigError
from vlm_collab.pictures.images import Codec, encode
from vlm_collab.protocol.messages import CUT_MARK, SUBPROTOCOL

VLLM = ("demo", "--backend", "vllm")


def refused(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Return exit code and the error line of a wrong command."""
    done = subprocess.run(
        [*SERVE, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | (env or {}),
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vlm-collab: ")
    return done.returncode, done.stderr


def photo() -> Picture:
    return Picture.open(encode(Image.effect_noise((800, 600), 50).convert("RGB"), Codec.JPEG, 90))


def test_it_serves_until_it_is_stopped():
    with serving("fake") as (process, ready):
        assert ready["event"] == "ready"
        assert ready["model"] == "fake"
        with Client(str(ready["url"])) as client:
            assert client.ask(photo(), "a small thing").refined
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors


def test_the_token_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLM_COLLAB_TOKEN", "s3cret")
    with serving("fake") as (_, ready):
        url = str(ready["url"])
        with Client(url, token="s3cret") as client:
            assert client.ask(photo(), "what?").text
        with pytest.raises(AuthenticationError), Client(url, token="wrong") as client:
            client.ask(photo(), "what?")


def test_the_token_is_taken_from_a_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with serving("fake", "--token-file", str(file)) as (_, ready):
        url = str(ready["url"])
        with Client(url, token="s3cret") as client:
            assert client.ask(photo(), "what?").text
        with pytest.raises(AuthenticationError), Client(url) as client:
            client.ask(photo(), "what?")


def test_server_and_client_warn_of_a_fit_that_crops(capsys):
    with serving("fake", "--fit", "crop") as (process, ready):
        url = str(ready["url"])
        assert main_of_ask(url, capsys)["shown"] == pytest.approx(0.75)  # 600 of 800 columns
        assert "not shown" in (told := main_of_ask(url, capsys, as_json=False))
        assert "25% of the picture" in told
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert errors.count("the fit is crop") == 1
    with serving("fake", "--fit", "pad") as (process, ready):
        assert main_of_ask(str(ready["url"]), capsys)["shown"] == 1.0
        process.send_signal(signal.SIGTERM)
        assert "crop" not in process.communicate(timeout=PATIENCE_S)[1]


def main_of_ask(url, capsys, *, as_json=True):
    """Return the output of `vlm-collab ask` about an 800 x 600 px photo."""
    with NamedTemporaryFile(suffix=".jpg") as file:
        file.write(encode(Image.effect_noise((800, 600), 50).convert("RGB"), Codec.JPEG, 90))
        file.flush()
        line = ["ask", file.name, "what?", "--server", url, *(["--json"] if as_json else [])]
        with pytest.raises(SystemExit) as ended:
            main(line)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    return json.loads(out) if as_json else out


def test_a_preset_from_a_file(tmp_path):
    text = (config_folder() / "models" / "demo.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("local_view_px: 112", "local_view_px: 50"), encoding="utf-8")
    with serving("fake", "--preset", str(mine)) as (_, ready), Client(str(ready["url"])) as client:
        answer = client.ask(photo(), "a small thing")
        assert answer.refined
        region = Picture.open(answer.region or b"")
        assert max(region.size) == 50
    code, line = refused("fake", "--preset", str(tmp_path / "none.yaml"))
    assert (code, "cannot be read" in line) == (2, True)
    code, line = refused("demo", "--preset", "qwen2.5-vl")
    assert "the preset is for the family 'qwen2.5-vl'" in line
    code, line = refused("fake", "--fit", "zoom")
    assert "zoom" in line
    assert "known: stretch, pad, crop" in line


def test_a_refused_client_is_one_line_in_the_log():
    with serving("fake", "--token", "s3cret") as (process, ready):
        with pytest.raises(AuthenticationError), Client(str(ready["url"]), token="no") as client:
            client.ask(photo(), "what?")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
    (line,) = log.splitlines()
    assert json.loads(line)["event"] == "connection refused"
    assert json.loads(line)["status"] == 401


def test_refused_clients_do_not_fill_the_log():
    """Refused sockets, invalid texts and bytes that are no HTTP: one log line of each kind."""
    with serving("fake") as (process, ready):
        place = urlsplit(str(ready["url"]))
        for _ in range(5):
            with pytest.raises(InvalidStatus):
                connect(str(ready["url"]), subprotocols=["chat"])
            with connect(str(ready["url"]), subprotocols=[SUBPROTOCOL]) as websocket:
                websocket.send(b"\xff\xfe", text=True)
                with pytest.raises(ConnectionClosedError):
                    websocket.recv()
            with socket.create_connection((place.hostname, place.port)) as raw:
                raw.sendall(b"\x00\x01 garbage\r\n\r\n")
                while raw.recv(1000):
                    pass
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
    lines = [json.loads(line) for line in log.splitlines()]
    assert sorted(line["event"] for line in lines) == [
        "Invalid HTTP request received.",
        "Invalid UTF-8 sequence received from client.",
        "connection refused",
    ]
    assert all(line["level"] == "warning" and "trace" not in line for line in lines)


def test_silent_clients_do_not_block_others_under_a_low_limit_on_open_files():
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, allowed[1]))
    try:
        starting = serving("fake")
        _, ready = starting.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    with contextlib.ExitStack() as opened:
        opened.push(starting)
        address = urlsplit(str(ready["url"]))
        for _ in range(400):
            silent = socket.create_connection((address.hostname, address.port), timeout=10)
            opened.enter_context(silent)
        # Within less than the 20 s after which silent connections are closed anyway.
        with urlopen(f"http://{address.netloc}/healthz", timeout=12) as answer:
            assert answer.status == 200


def test_settings_of_the_policy_reach_the_model():
    with serving("fake", "--policy", "always") as (_, ready), Client(str(ready["url"])) as client:
        assert client.ask(photo(), "what?").refined
    with serving("fake", "--eta", "9") as (_, ready), Client(str(ready["url"])) as client:
        assert not client.ask(photo(), "a small thing").refined


def test_an_early_decision_cuts_first_answers_unless_they_are_provisional():
    """The server's messages while the second pass runs."""
    early = ("fake", "--policy", "always", "--aggregate", "first_k", "--k", "2")
    for options, cut in (early, True), ((*early, "--provisional"), False):
        with serving(*options) as (_, ready), Client(str(ready["url"])) as client:
            answer = client.ask(photo(), "what is that?")
            assert answer.refined
            assert answer.first_text.endswith(CUT_MARK if cut else "what is that?")
            assert answer.usage.decoded_tokens == (2 if cut else 6) + 7


def test_ratios_reach_the_region_search():
    sides = []
    for options in (), ("--ratios", "3.0"), ("--ratios", "3.0,4.0", "--epsilon", "0.5"):
        with serving("fake", "--policy", "always", *options) as (_, ready):
            with Client(str(ready["url"])) as client:
                box = client.ask(photo(), "what?").box
                assert box is not None
                sides.append(box.height)
    assert sides == [112, 336, 336]


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, line = refused("fake", "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "in use" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no/such/folder/model",), "no/such/folder/model"),
        (("fake", "--host", "0.0.0.0"), "without a token"),
        (("fake", "--host", "256.1.1.1", "--token", "t"), "cannot listen"),
        (("fake", "--port", "99999"), "port"),
        (("fake", "--token", " "), "token is empty"),
        (("fake", "--token", "abc "), "blanks"),
        (("fake", "--tls-cert", "missing.pem"), "TLS"),
        (("fake", "--tls-cert", "missing.pem", "--tls-key", "missing.pem"), "missing.pem"),
        (("fake", "--tls-cert", __file__, "--tls-key", __file__), "TLS"),
        (("fake", "--policy", "sometimes"), "sometimes"),
        (("fake", "--policy", "random"), "rate"),
        (("fake", "--rate", "0.5"), "--policy random"),
        (("fake", "--metric", "gut_feeling"), "gut_feeling"),
        (("fake", "--placement", "anywhere"), "anywhere"),
        (("fake", "--base-px", "0"), "base_px"),
        (("fake", "--ratios", "1.0;1.2"), "--ratios"),
        (("fake", "--ratios", ""), "--ratios"),
        (("fake", "--ratios", "1.0,0"), "ratios[1]"),
        (("fake", "--ratios", "nan"), "ratios[0]"),
        (("fake", "--prompt", "haiku"), "haiku"),
        (("fake", "--aggregate", "first_k", "--k", "0"), "k`"),
        (("fake", "--aggregate", "first_k", "--k", "2.5"), "--k"),
        (("fake", "--k", "3"), "k needs the aggregate first_k"),
        (("fake", "--epsilon", "-0.1"), "epsilon"),
        (("fake", "--epsilon", "inf"), "epsilon"),
        (("fake", "--epsilon", "nan"), "epsilon"),
        (("fake", "--view-px", "0"), "view_px"),
        (("fake", "--view-px", "224"), "view_px of the fake model is 112"),
        (("fake", "--eta", "-1"), "eta"),
        (("fake", "--eta", "much"), "--eta"),
        (("fake", "--quality", "0"), "quality"),
        (("fake", "--max-queue", "0"), "max_queue"),
        (("fake", "--max-question-bytes", "0"), "max_question_bytes"),
        (("fake", "--max-question-bytes", "1048577"), "max_question_bytes"),
        (("fake", "--max-per-address", "-1"), "max_per_address"),
        (("fake", "--log-level", "loud"), "loud"),
        (("fake", "--no-such-option"), "--no-such-option"),
        (("--no-such-option", "fake"), "--no-such-option"),
        (("fake", "another"), "another"),
        (("demo", "--device", "meta"), "no device 'meta'"),
        (("demo", "--device", "cuda:99"), "cannot use the device 'cuda:99'"),
        (("fake", "--backend", "torch"), "no backend 'torch'"),
        ((*VLLM,), "vLLM does not take port 0"),
        (("fake", "--backend", "vllm", "--port", "1"), "without vLLM"),
        ((*VLLM, "--port", "1", "--device", "cpu"), "leave out --device"),
        ((*VLLM, "--port", "1", "--host", "0.0.0.0"), "without a token"),
        ((*VLLM, "--port", "1", "--enforce-eager", "--additional-config={}"), "KEY VALUE"),
    ],
)
def test_wrong_use_gets_one_clear_line(arguments, words):
    code, line = refused("--port", "0", *arguments)
    assert code in (1, 2)
    assert words in line


def test_a_missing_vllm_is_reported():
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    code, line = refused(*VLLM, "--port", "1", "--max-model-len", "512", "--enforce-eager")
    assert code == 2
    assert "pip install 'vlm-collab[vllm]'" in line
    with pytest.raises(ConfigError, match=r"pip install 'vlm-collab\[vllm\]'"):
        open_model(backend="vllm")


def test_vllm_refuses_instructblip_and_names_the_other_backend(tmp_path):
    folder = save_tiny_llava(tmp_path / "instructblip-vicuna-7b")
    rename_family(folder, "instructblip")
    code, line = refused(str(folder), "--backend", "vllm", "--port", "1")
    assert code == 2
    assert "does not serve instructblip; use --backend transformers" in line


def test_wrong_use_with_json_gets_an_object():
    done = subprocess.run(
        [*SERVE, "fake", "--json", "--quality", "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "quality" in json.loads(done.stdout)["error"]
