"""`vlm-collab serve --backend vllm` until vLLM takes over."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from server_plugin.backends.open import demo_folder, preset_of, with_options
from server_plugin.models.presets import config_folder
from server_plugin.service.config import ServiceConfig
from server_plugin.vllm_server import launch as serve
from server_plugin.vllm_server.endpoint import options_of
from tests.support.vllm_cpu.environment import parsed
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Fit


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Provide the one name that is imported from vLLM: its platform."""
    platform = SimpleNamespace(is_cpu=lambda: True)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = platform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return platform


def invoke(
    config: ServiceConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> serve.Invocation:
    return serve.invocation(
        "demo",
        config or ServiceConfig(),
        overrides=overrides or {},
        options=options or {},
        **others,
    )


def value(arguments: tuple[str, ...], option: str) -> str:
    """Return the value that vLLM's parser would use: the last one."""
    return arguments[len(arguments) - arguments[::-1].index(option)]


def test_every_option_is_translated_to_vllm_s() -> None:
    config = ServiceConfig(
        host="::1", port=7, token="t", tls_cert=(file := Path(__file__)), tls_key=file
    )
    started = invoke(
        config,
        {"eta": 0.25, "layer": None, "metric": "entropy"},
        {"policy": "random", "policy_options": {"rate": 0.5, "seed": None}, "quality": 80},
        dtype="bfloat16",
        batch=9,
        log_level="error",
        vllm_options=["--max-model-len", "512", "--dtype=float16"],
    )
    given = started.arguments
    assert given[:2] == ("serve", str(demo_folder()))
    assert (value(given, "--host"), value(given, "--port")) == ("::1", "7")
    assert value(given, "--ssl-certfile") == value(given, "--ssl-keyfile") == __file__
    assert value(given, "--max-num-seqs") == "9"
    assert value(given, "--shutdown-timeout") == "20", "as with the other backend"
    assert value(given, "--max-logprobs") == "-1"
    assert value(given, "--served-model-name") == "demo"
    assert value(given, "--dtype") == "bfloat16"
    assert given.index("--dtype=float16") > given.index("--dtype"), "the user's come last"
    assert json.loads(value(given, "--limit-mm-per-prompt")) == {"image": 2}
    ours = json.loads(value(given, "--additional-config.vlm_collab"))
    options = options_of({"vlm_collab": ours})
    assert options.preset == "demo"
    assert options.overrides == {"eta": 0.25, "metric": "entropy"}
    assert (options.policy, options.quality) == ("random", 80)
    assert "t" not in given, "any user of the machine can read the command line"
    assert started.environment["VLLM_API_KEY"] == "t"
    assert started.environment["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_another_preset_and_fit_reach_vllm_s_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (config_folder() / "models" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("eta: 0.25", "eta: 0.75"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    started = invoke(preset="mine.yaml", overrides={"fit": "pad"})
    ours = json.loads(value(started.arguments, "--additional-config.vlm_collab"))
    options = options_of({"vlm_collab": ours})
    assert options.preset == str(tmp_path / "mine.yaml"), "wherever they are started"
    chosen = with_options(preset_of("demo", options.preset), options.overrides)
    assert (chosen.eta, chosen.fit) == (0.75, Fit.PAD)


def test_options_that_are_not_given_keep_vllm_s_defaults(vllm: SimpleNamespace) -> None:
    vllm.is_cpu = lambda: False
    started = invoke()
    assert value(started.arguments, "--host") == "127.0.0.1"
    for option in ("--dtype", "--block-size", "--max-num-seqs", "--max-logprobs", "--ssl-certfile"):
        assert option not in started.arguments
    assert set(started.environment) == {"VLLM_PLUGINS"}
    graphs = json.loads(value(started.arguments, "--compilation-config"))
    assert graphs == {"cudagraph_mode": "PIECEWISE"}


PIECEWISE = '"cudagraph_mode": "PIECEWISE"'


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        (["-cc", '{"mode": 3}'], ["-cc", f'{{{PIECEWISE}, "mode": 3}}']),
        (["-c", '{"mode": 3}'], ["-c", f'{{{PIECEWISE}, "mode": 3}}']),
        (['-cc={"mode": 3}'], [f'-cc={{{PIECEWISE}, "mode": 3}}']),
        (
            ["--compilation_config", '{"mode": 3}', "--seed", "1"],
            ["--compilation_config", f'{{{PIECEWISE}, "mode": 3}}', "--seed", "1"],
        ),
        (["--compil.mode", "3"], ["--compil.mode", "3", "--compil.cudagraph_mode", "PIECEWISE"]),
        (
            ["-cc.mode=3", "--compilation-config.mode", "3", "-cc.level=1", "-O3"],
            [
                *("-cc.mode=3", "--compilation-config.mode", "3", "-cc.level=1", "-O3"),
                *("-cc.cudagraph_mode", "PIECEWISE"),
                *("--compilation-config.cudagraph_mode", "PIECEWISE"),
            ],
        ),
    ],
)
def test_options_of_compilation_keep_the_graphs_that_rows_need(
    given: list[str], handed_on: list[str]
) -> None:
    arguments = invoke(vllm_options=given).arguments
    assert list(arguments[arguments.index("demo") + 1 : -2]) == handed_on


@pytest.mark.parametrize(
    "given",
    [
        ["-cc", '{"cudagraph_mode": "NONE"}'],
        ["-cc.cudagraph_mode=NONE", "-cc.mode", "3"],
        ["--compilation-config.cudagraph_mode", "NONE"],
        # vLLM's own errors for these are clearer.
        ["-cc", "3"],
        ["-cc", "{"],
        ["-cc"],
        # None of these is about compilation.
        ["--", "-", "--config-format", "hf", "-O3", "--cudagraph-capture-sizes", "1"],
    ],
)
def test_a_graph_mode_that_the_user_sets_is_kept(given: list[str]) -> None:
    arguments = invoke(vllm_options=given).arguments
    assert list(arguments[arguments.index("demo") + 1 : -2]) == given


@pytest.mark.vllm
@pytest.mark.xdist_group("parser")
def test_vllm_s_own_parser_takes_the_user_s_options_and_the_graphs() -> None:
    """Every form of a dictionary option, through vLLM's real parser."""
    forms: dict[str, list[str]] = {
        "none": [],
        "dotted": ["--compilation-config.mode", "3"],
        "short, dotted": ["-cc.mode=3"],
        "json": ["--compilation-config", '{"mode": 3}'],
        "short json": ['-cc={"mode": 3}'],
        "both": ["-cc", '{"mode": 3}', "--compilation_config.cudagraph_capture_sizes+=1,2"],
        "abbreviated": ["--compil.mode", "3"],
        "the user's": ["-cc.mode=3", "-cc.cudagraph_mode=FULL"],
    }
    others = ["--limit-mm-per-prompt", '{"image": 4}', "--dtype", "bfloat16", "--block-size=64"]
    jobs = [
        list(invoke(vllm_options=[*form, *others, "--additional-config.other", "1"]).arguments)
        for form in forms.values()
    ]
    results = dict(zip(forms, parsed(jobs), strict=True))
    for name, result in results.items():
        assert result["cudagraph_mode"] == ("FULL" if name == "the user's" else "PIECEWISE"), name
        assert result["mode"] == (None if name in ("none", "both") else 3), name
        assert result["sizes"] == ([1, 2] if name == "both" else None), name
        assert result["limit_mm_per_prompt"] == {"image": 4}
        assert (result["dtype"], result["block_size"]) == ("bfloat16", 64)
        assert options_of(result["additional_config"]).preset == "demo"
        assert result["additional_config"]["other"] == 1


def test_other_plugins_stay_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="lora_resolver")
    monkeypatch.setattr(
        serve, "entry_points", lambda group: [point] if group == "vllm.general_plugins" else []
    )
    assert invoke().environment["VLLM_PLUGINS"] == "lora_resolver,vlm_collab"
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert invoke().environment["VLLM_PLUGINS"] == "mine,vlm_collab"
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert invoke().environment["VLLM_PLUGINS"] == "vlm_collab"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"overrides": {"layer": 99}}, "layer 99 does not exist"),
        ({"overrides": {"k": 3}}, "k needs the aggregate first_k"),
        ({"overrides": {"epsilon": float("inf")}}, "epsilon"),
        ({"options": {"policy_options": {"rate": 0.5}}}, "--policy random"),
        ({"options": {"policy": "sometimes"}}, "sometimes"),
        ({"vllm_options": ["--additional_config", "{}"]}, "KEY VALUE"),
        # vLLM would read these as `--additional-config` too, and drop this package's options.
        ({"vllm_options": ["--additional={}"]}, "KEY VALUE"),
        ({"vllm_options": ["--addi.other", "1"]}, "KEY VALUE"),
        ({"vllm_options": ["--config", "vllm.yaml"]}, "--config"),
        ({"vllm_options": ["--config=vllm.yaml"]}, "--config"),
    ],
)
def test_wrong_options_are_refused_before_vllm_starts(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        invoke(**given)


@pytest.mark.parametrize(
    ("vllm_options", "line"),
    [
        (["--logprobs-mode", "processed_logprobs"], "must be raw_logprobs, not processed_logprobs"),
        (["--logprobs_mode=processed_logits"], "must be raw_logprobs, not processed_logits"),
        (["-dp", "2"], "one server per replica"),
        (["--data-parallel-size=2"], "one server per replica"),
        (["--limit-mm-per-prompt", '{"image": 1}'], "two pictures"),
    ],
)
def test_what_the_backend_would_refuse_is_refused_before_a_model_is_loaded(
    vllm_options: list[str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        invoke(vllm_options=vllm_options)


def test_the_user_cannot_lower_max_logprobs_with_the_metric_entropy() -> None:
    entropy = {"metric": "entropy"}
    invoke(overrides=entropy)
    with pytest.raises(ConfigError, match="--max-logprobs -1"):
        invoke(overrides=entropy, vllm_options=["--max-logprobs", "20"])


@pytest.mark.parametrize(
    "vllm_options",
    [
        ["--logprobs-mode", "raw_logprobs", "--data-parallel-size", "1"],
        ["--logprobs-mode", "processed_logprobs", "--logprobs-mode", "raw_logprobs"],
        ["--limit-mm-per-prompt", '{"image": 4}'],
        ["--limit-mm-per-prompt", '{"image": {"count": 4}}'],
        # vLLM reports the errors in these.
        ["--limit-mm-per-prompt", "7"],
        ["--limit-mm-per-prompt", "{"],
        ["--data-parallel-size", "two"],
        ["--data-parallel-size"],
        # The demo model is a folder, which has no revisions.
        ["--revision", "v2"],
    ],
)
def test_nothing_else_is_refused_there(vllm_options: list[str]) -> None:
    assert invoke(vllm_options=vllm_options).arguments
