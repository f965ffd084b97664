"""Installing the row capture in a worker, without vLLM: wrapped functions, and refusals.

The stand-ins below have only those attributes of vLLM's objects that the table in
`server_plugin.backends.vllm.capture` names. A use of any other attribute fails here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server_plugin.backends.vllm import capture
from server_plugin.backends.vllm.capture import FIRST, KEY, STOP

SCOPE, ROW = "a secret ", "a secret b"
LAYER = 3
NAME = f"language_model.model.layers.{LAYER}.self_attn.attn"
HEADS, WIDTH, BLOCK, CONTEXT = 2, 4, 16, 40
TABLE = torch.tensor([[0, 0, 0], [4, 1, 3]])
CACHE = torch.randn(5, HEADS, BLOCK, 2 * WIDTH, generator=torch.Generator().manual_seed(0))


class Worker:
    """A worker of one rank that runs steps of two requests, "a" before "b"."""

    def __init__(self, backend: str = "FLASH_ATTN", *, v2: bool = False) -> None:
        self.ran: list[str] = []
        self.impl = SimpleNamespace(
            forward=self.attend,
            scale=0.5,
            num_heads=HEADS,
            head_size=WIDTH,
            num_kv_heads=HEADS,
            kv_cache_dtype="auto",
        )
        self.layer = SimpleNamespace(
            impl=self.impl,
            layer_name=NAME,
            attn_backend=SimpleNamespace(get_name=lambda: backend),
        )
        if backend == "CPU_ATTN":
            self.layer.isa = "vec"
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(
                static_forward_context={NAME: self.layer}, cudagraph_mode=None
            ),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
            speculative_config=None,
            use_v2_model_runner=v2,
        )
        self.model_runner = SimpleNamespace(
            vllm_config=self.config, execute_model=self.execute_model
        )
        if v2:
            self.model_runner.prepare_inputs = lambda scheduled: SimpleNamespace(
                req_ids=["a", "b"], scheduled=scheduled
            )
        else:
            self.model_runner.input_batch = SimpleNamespace(req_ids=["a", "b"])

    def attend(self, layer: Any, *args: Any) -> str:
        self.ran.append("attention")
        return "attended"

    def execute_model(self, scheduled: Any, **kwargs: Any) -> str:
        if hasattr(self.model_runner, "prepare_inputs"):
            assert self.model_runner.prepare_inputs(scheduled).scheduled is scheduled
        query = torch.arange(4.0 * HEADS * WIDTH).view(4, -1) / 20
        metadata = None if kwargs else SimpleNamespace(block_table=TABLE)
        result = self.impl.forward(self.layer, query, None, None, CACHE, metadata)
        assert result == "attended"
        self.ran.append("step")
        return "executed"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `vllm` that has only a version."""
    module: Any = ModuleType("vllm")
    module.__version__ = "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def a_step() -> SimpleNamespace:
    """A step: one token of "a", and the last three of the prompt of "b", which requests its row."""
    return SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id="b",
                prompt_token_ids=list(range(CONTEXT)),
                num_computed_tokens=CONTEXT - 3,
                sampling_params=SimpleNamespace(extra_args={KEY: ROW, FIRST: 2, STOP: 20}),
            )
        ],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["a"], num_computed_tokens=[7]),
        num_scheduled_tokens={"a": 1, "b": 3},
    )


@pytest.mark.parametrize(
    ("backend", "v2"),
    [
        *itertools.product(
            ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN"), (False, True)
        ),
        ("FLASHINFER", False),
    ],
)
def test_an_installed_worker_reads_the_row_of_a_step(backend: str, v2: bool) -> None:
    worker = Worker(backend, v2=v2)
    if backend == "FLASHINFER":
        table = SimpleNamespace(get_device_tensor=lambda count: TABLE[:count])
        worker.model_runner.input_batch.block_table = [table]
        worker.model_runner.input_batch.num_reqs = 2
        worker.model_runner.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=[NAME])]
        )
    assert capture._install(worker, LAYER, SCOPE) == {"heads": HEADS}
    assert worker.model_runner.execute_model(a_step()) == "executed"
    assert worker.ran == ["attention", "step"]
    ((data, heads),) = capture._take(worker, [ROW])  # type: ignore[misc]
    assert heads == HEADS
    blocks = CACHE[TABLE[1]]
    if backend == "CPU_ATTN":  # all keys before all values, column-major
        keys = blocks.view(3, HEADS, 2, WIDTH, BLOCK)[:, :, 0].transpose(2, 3)
    else:
        keys = blocks[..., :WIDTH]
    keys = keys.transpose(0, 1).reshape(HEADS, -1, WIDTH)[:, :CONTEXT]
    query = (torch.arange(4.0 * HEADS * WIDTH).view(4, HEADS, WIDTH) / 20)[3]
    weights = torch.einsum("hw,htw->ht", query, keys).mul(0.5).softmax(-1)
    np.testing.assert_allclose(np.frombuffer(data, np.float32), weights.sum(0)[2:20], rtol=1e-5)
    assert capture._held(worker) == {"pending": 0, "rows": 0}


def test_warm_up_steps_are_ignored() -> None:
    worker = Worker()
    capture._install(worker, LAYER, SCOPE)
    assert worker.model_runner.execute_model(a_step(), dummy_run=True) == "executed"
    assert capture._held(worker) == {"pending": 0, "rows": 0}


def test_a_row_that_cannot_be_read_does_not_stop_the_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Worker()
    capture._install(worker, LAYER, SCOPE)
    worker.model_runner.input_batch.req_ids = ["who is this?"]
    assert worker.model_runner.execute_model(a_step()) == "executed"
    assert capture._take(worker, [ROW]) == [None]
    assert "attention rows could not be captured" in caplog.text


def test_a_second_front_end_shares_the_installed_capture() -> None:
    worker = Worker()
    capture._install(worker, LAYER, SCOPE)
    wrapped = worker.model_runner.execute_model, worker.impl.forward
    assert capture._install(worker, LAYER, SCOPE) == {"heads": HEADS}
    assert (worker.model_runner.execute_model, worker.impl.forward) == wrapped
    refused = capture._install(worker, 2, SCOPE)
    assert "rows of layer 3 are served already, not of 2" in refused["error"]


def test_a_pipeline_stage_without_the_layer_has_no_heads() -> None:
    worker = Worker()
    worker.config.parallel_config.pipeline_parallel_size = 2
    assert capture._install(worker, LAYER + 1, SCOPE) == {"heads": 0}
    assert capture._take(worker, ["x", "y"]) == [None, None]
    assert capture._held(worker) == {"pending": 0, "rows": 0}


def graphs(name: str) -> Callable[[Worker], None]:
    return lambda worker: setattr(
        worker.config.compilation_config, "cudagraph_mode", SimpleNamespace(name=name)
    )


def parallel(**values: Any) -> Callable[[Worker], None]:
    return lambda worker: worker.config.parallel_config.__dict__.update(values)


def attention(**values: Any) -> Callable[[Worker], None]:
    return lambda worker: worker.impl.__dict__.update(values)


def without(path: str) -> Callable[[Worker], None]:
    """An attribute is missing, as it may be in another release of vLLM."""

    def remove(worker: Worker) -> None:
        *parents, last = path.split(".")
        owner: Any = worker
        for parent in parents:
            owner = getattr(owner, parent)
        delattr(owner, last)

    return remove


def no_layer(worker: Worker) -> None:
    worker.config.compilation_config.static_forward_context.clear()


def no_group(worker: Worker) -> None:
    """With FlashInfer, the block table is that of the layer's cache group."""
    worker.layer.attn_backend.get_name = lambda: "FLASHINFER"
    worker.model_runner.kv_cache_config = SimpleNamespace(kv_cache_groups=[])
    worker.model_runner.input_batch.block_table = []


def failing(error: BaseException) -> Callable[[Worker], None]:
    """vLLM raises an unexpected error."""

    def change(worker: Worker) -> None:
        def get_name() -> str:
            raise error

        worker.layer.attn_backend.get_name = get_name

    return change


@pytest.mark.parametrize(
    ("backend", "v2", "change", "missing"),
    [
        ("FLASH_ATTN", False, no_layer, f"no attention layer {NAME}"),
        (
            "CPU_ATTN",
            False,
            lambda worker: setattr(worker.layer, "isa", "amx"),
            "instruction set amx",
        ),
        ("CPU_ATTN", False, without("layer.isa"), "isa"),
        ("FLASHMLA", False, None, "the attention backend FLASHMLA"),
        ("FLASHINFER", True, None, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("FLASHINFER", False, no_group, f"cache group of {NAME}"),
        ("FLASH_ATTN", False, graphs("FULL"), "cudagraph_mode FULL"),
        ("FLASH_ATTN", False, graphs("FULL_AND_PIECEWISE"), "cudagraph_mode FULL_AND_PIECEWISE"),
        ("FLASH_ATTN", False, parallel(use_ubatching=True), "micro-batches"),
        ("FLASH_ATTN", False, parallel(decode_context_parallel_size=2), "decode context"),
        ("FLASH_ATTN", False, parallel(prefill_context_parallel_size=2), "prefill context"),
        (
            "FLASH_ATTN",
            False,
            lambda worker: setattr(worker.config, "speculative_config", SimpleNamespace()),
            "speculative",
        ),
        ("FLASH_ATTN", False, attention(kv_cache_dtype="fp8_e4m3"), "type fp8_e4m3"),
        ("FLASH_ATTN", False, attention(sliding_window=(127, 0)), "sliding-window"),
        ("FLASH_ATTN", False, attention(logits_soft_cap=30.0), "soft-capped"),
        ("FLASH_ATTN", False, attention(alibi_slopes=[0.1]), "ALiBi"),
        ("FLASH_ATTN", False, attention(sinks=torch.ones(2)), "sinks"),
        ("FLASH_ATTN", True, without("model_runner.prepare_inputs"), "prepare_inputs"),
        ("FLASH_ATTN", False, without("model_runner.input_batch"), "input_batch"),
        ("FLASH_ATTN", False, without("model_runner.execute_model"), "execute_model"),
        ("FLASH_ATTN", False, without("impl.forward"), "forward"),
        ("FLASH_ATTN", False, without("config.use_v2_model_runner"), "use_v2_model_runner"),
        ("FLASH_ATTN", False, failing(AssertionError("not\nbuilt")), "AssertionError: not built"),
        ("FLASH_ATTN", False, failing(StopIteration()), "StopIteration"),
    ],
)
def test_what_is_missing_is_named_with_the_version_and_nothing_is_wrapped(
    backend: str,
    v2: bool,
    change: Callable[[Worker], None] | None,
    missing: str,
) -> None:
    worker = Worker(backend, v2=v2)
    if change is not None:
        change(worker)
    before = dict(vars(worker.model_runner)), dict(vars(worker.impl)), set(vars(worker))
    answer = capture._install(worker, LAYER, SCOPE)
    assert set(answer) == {"error"}
    assert answer["error"].startswith("vLLM 0.32.0 cannot give attention rows here: ")
    assert missing in answer["error"]
    assert "\n" not in answer["error"]
    assert (vars(worker.model_runner), vars(worker.impl), set(vars(worker))) == before


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.32.0", "0.3.2"])
def test_another_release_is_refused_by_its_version(version: str, vllm: Any) -> None:
    vllm.__version__ = version
    error = capture._install(Worker(), LAYER, SCOPE)["error"]
    assert error == f"vLLM {version} cannot give attention rows here: release (supported: 0.32)"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.0.dev3"])
def test_every_patch_of_the_release_is_accepted(version: str, vllm: Any) -> None:
    vllm.__version__ = version
    assert capture._install(Worker(), LAYER, SCOPE) == {"heads": HEADS}


def test_every_worker_gets_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    class WorkerBase:
        pass

    module: Any = ModuleType("vllm.v1.worker.worker_base")
    module.WorkerBase = WorkerBase
    for parent in ("vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", module)
    capture.register()

    class Derived(WorkerBase, Worker):
        pass

    worker: Any = Derived()
    assert worker.vlm_collab_take(["x"]) == [None]
    assert worker.vlm_collab_install(LAYER, SCOPE) == {"heads": HEADS}
    assert worker.vlm_collab_held() == {"pending": 0, "rows": 0}
