"""`vlm-collab serve` as a process: it says where it is, stops well, and refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from importlib.util import find_spec

import pytest

from edge_client.picture import Picture
from edge_client.sync import Client
from server_plugin.models import open_model
from tests.support.process import SERVE, serving
from tests.support.tiny_llava import rename_family, save_tiny_llava
from vlm_collab.errors import AuthenticationError, ConfigError
from vlm_collab.images import Codec, encode
from vlm_collab.messages import CUT_MARK

VLLM = ("demo", "--backend", "vllm")


def refused(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and the one line that a wrong command gets."""
    done = subprocess.run(
        [*SERVE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (env or {}),
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vlm-collab: ")
    return done.returncode, done.stderr


def photo() -> Picture:
    from PIL import Image

    return Picture.open(encode(Image.effect_noise((800, 600), 50).convert("RGB"), Codec.JPEG, 90))


def test_it_serves_until_it_is_told_to_stop():
    with serving("fake") as (process, ready):
        assert ready["event"] == "ready"
        assert ready["model"] == "fake"
        with Client(str(ready["url"])) as client:
            assert client.ask(photo(), "a small thing").refined
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors


def test_the_token_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLM_COLLAB_TOKEN", "s3cret")
    with serving("fake") as (_, ready):
        url = str(ready["url"])
        with Client(url, token="s3cret") as client:
            assert client.ask(photo(), "what?").text
        with pytest.raises(AuthenticationError), Client(url, token="wrong") as client:
            client.ask(photo(), "what?")


def test_a_refused_client_is_one_line_in_the_log():
    with serving("fake", "--token", "s3cret") as (process, ready):
        with pytest.raises(AuthenticationError), Client(str(ready["url"]), token="no") as client:
            client.ask(photo(), "what?")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    (line,) = log.splitlines()
    assert json.loads(line)["event"] == "connection refused"
    assert json.loads(line)["status"] == 401


def test_settings_of_the_policy_reach_the_model():
    with serving("fake", "--policy", "always") as (_, ready), Client(str(ready["url"])) as client:
        assert client.ask(photo(), "what?").refined
    with serving("fake", "--eta", "9") as (_, ready), Client(str(ready["url"])) as client:
        assert not client.ask(photo(), "a small thing").refined


def test_an_early_decision_is_an_option_of_the_policy_and_can_be_shown_whole():
    """What the server says while the second answer is in the making."""
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
        (("fake", "--max-per-address", "-1"), "max_per_address"),
        (("fake", "--log-level", "loud"), "loud"),
        (("fake", "--no-such-option"), "--no-such-option"),
        (("--no-such-option", "fake"), "--no-such-option"),
        (("fake", "another"), "another"),
        (("fake", "--backend", "torch"), "no backend 'torch'"),
        ((*VLLM,), "vLLM takes no port 0"),
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


def test_vllm_is_named_where_it_is_missing():
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    code, line = refused(*VLLM, "--port", "1", "--max-model-len", "512", "--enforce-eager")
    assert code == 2
    assert "pip install 'vlm-collab[vllm]'" in line
    with pytest.raises(ConfigError, match=r"pip install 'vlm-collab\[vllm\]'"):
        open_model(backend="vllm")


def test_instructblip_is_sent_to_the_other_backend(tmp_path):
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
