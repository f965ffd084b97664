"""Fixtures of a `VllmBackend` over a scripted engine, without vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from server_plugin.backends.open import demo_folder
from server_plugin.backends.transformers.adapters.base import Adapter
from server_plugin.backends.vllm.backend import VllmBackend
from server_plugin.backends.vllm.model import check, weightless_adapter
from server_plugin.models.presets import preset_named
from tests.support.scripted_vllm import ScriptedVllm


@pytest.fixture
def vllm_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the two names that the backend imports from vLLM."""
    package, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    source, preset = str(demo_folder()), preset_named("demo")
    return weightless_adapter(check(source, preset, "demo"), source, preset, 512)


@pytest.fixture
def engine(adapter: Adapter) -> ScriptedVllm:
    return ScriptedVllm(adapter)


@pytest.fixture
def backend(engine: ScriptedVllm, adapter: Adapter) -> VllmBackend:
    return VllmBackend(engine, adapter, "demo")
