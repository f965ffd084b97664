"""The worker side of the vLLM plugin: attention rows of requests that ask for them.

Registered as a `vllm.general_plugins` entry point, so vLLM calls `register` in each of its
processes. It adds three methods to the workers, for `collective_rpc`; nothing else changes until
the first of them is called. It wraps two functions of each worker: the one that runs a step, to
learn which prompts end in it, and the forward of the attention layer whose row is read. A step in
which no such prompt ends costs only a check of its list of requests.

All use of vLLM's internals is in this module:

what                                                why                               since
`WorkerBase`, with a method set on it               `collective_rpc` finds it there   0.11
`Worker.model_runner.execute_model(scheduler_out…)` a step, and what it schedules     0.11
`SchedulerOutput.{scheduled_new_reqs,               ids, prompt lengths and positions 0.11
  scheduled_cached_reqs, num_scheduled_tokens,      of what is scheduled
  finished_req_ids}`
`SamplingParams.extra_args`                         carries the row request           0.10
V1: `runner.input_batch.req_ids`                    order of requests in the step     0.8
V2: `runner.prepare_inputs(…).req_ids`              the same (read, never run)        0.25
`compilation_config.static_forward_context`         the attention layers by name      0.8
`layer.impl.forward(layer, query, key, value,       query of the step; keys of the    0.32
  kv_cache, metadata, output, …)` as an attribute   step are in the cache when it is
  of the instance                                   called
`layer.impl.{scale, num_heads, num_kv_heads,        to compute the same scores, or    0.32
  sliding_window, alibi_slopes, logits_soft_cap,    to refuse what is not computed
  sinks, kv_cache_dtype}`
`kv_cache` (blocks, kv heads, block, 2 · head)      the keys                          0.32
`layer.isa` (CPU)                                   how a block's keys lie            0.12
`metadata.block_table`; FlashInfer: `runner.        where a request's blocks are      0.32
  input_batch.block_table[group]` (read only)
`compilation_config.cudagraph_mode`                 a full CUDA graph replays past    0.11
                                                    any Python, and rows with it

Versions before 0.32 were not tested. Rows were compared on CPU attention; the CUDA paths follow
vLLM's source and were never run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server_plugin.backends.vllm.rows import summed_row, token_major_keys, vector_keys

log = logging.getLogger(__name__)

SUPPORTED = "0.32"
"""The vLLM release whose internals are used here."""

INSTALL, TAKE, HELD = "vlm_collab_install", "vlm_collab_take", "vlm_collab_held"
"""Names of the worker methods."""

KEY, FIRST, STOP = "vlm_collab_key", "vlm_collab_first", "vlm_collab_stop"
"""Keys in `extra_args` of a request that needs its row: the row's key, which begins with the secret
of the caller that installed the capture, and the span of prompt positions."""

MAX_ROWS = 1024
"""Most rows kept until they are fetched; the oldest are dropped first."""

MAX_ROWS_BYTES = 32 * 2**20
"""Most device memory of all kept rows, which vLLM's own budget does not include. A row may be as
long as a prompt."""

_LAYER = "language_model.model.layers.{}.self_attn.attn"

Keys = Callable[[Tensor, Tensor], Tensor]
"""(cache, blocks) -> keys; see `server_plugin.backends.vllm.rows`."""

_CPU_KEYS: dict[str, Keys] = {"vec": vector_keys, "vec16": vector_keys}
_CUDA_KEYS: dict[str, Keys] = {
    "FLASH_ATTN": token_major_keys,
    "TRITON_ATTN": token_major_keys,
    "FLEX_ATTENTION": token_major_keys,
    "FLASHINFER": token_major_keys,
}


class UnsupportedError(Exception):
    """The row cannot be read in this release of vLLM, or with its settings."""


@dataclass(frozen=True, slots=True)
class _RowRequest:
    """A request whose attention row is needed.

    Attributes:
        key: key of the row.
        first, stop: the span of prompt positions.
        prompt: length of the prompt.
    """

    key: str
    first: int
    stop: int
    prompt: int


@dataclass(slots=True, eq=False)
class RowReader:
    """Captures rows in one worker.

    Attributes:
        order: returns the requests of the running step, in the order of its attention layers.
        keys: reads the layer's keys.
        block_table: returns (requests, blocks) from attention metadata.
        pending: requests whose prompt has not ended yet.
        due: for each request whose prompt ends in this step, the index of its last prompt token
            among its queries of the step.
        lengths: number of queries of each request in this step.
        rows: captured rows that were not fetched yet, summed over this worker's heads.
        rows_bytes: memory of these rows, in bytes.
        heads: number of heads of the layer in this worker.
        scopes: secret prefixes; rows are captured only if their key begins with one.
    """

    order: Callable[[], list[str]]
    keys: Keys
    block_table: Callable[[Any], Tensor]
    heads: int
    scopes: set[str]
    pending: dict[str, _RowRequest] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    rows: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    rows_bytes: int = 0

    def step(self, scheduled: Any) -> None:
        """Note which prompts end in a step, from what it schedules."""
        for gone in scheduled.finished_req_ids:
            self.pending.pop(gone, None)
        computed: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            if (request := _row_request(new)) is not None and request.key.startswith(
                tuple(self.scopes)
            ):
                self.pending[new.req_id] = request
                computed[new.req_id] = new.num_computed_tokens
        self.due = {}
        if not self.pending:
            return
        continued = scheduled.scheduled_cached_reqs
        computed.update(zip(continued.req_ids, continued.num_computed_tokens, strict=True))
        self.lengths = scheduled.num_scheduled_tokens
        for name, request in self.pending.items():
            index = request.prompt - 1 - computed.get(name, request.prompt)
            if 0 <= index < self.lengths.get(name, 0):
                self.due[name] = index

    def read(self, layer: Any, query: Tensor, cache: Tensor, metadata: Any) -> None:
        """Capture the rows that are due, after the layer's attention."""
        due, self.due = self.due, {}
        table, start = self.block_table(metadata), 0
        impl = layer.impl
        for number, name in enumerate(self.order()):
            if name in due:
                request = self.pending.pop(name)
                count = -(-request.prompt // cache.shape[2])
                self._keep(
                    request.key,
                    summed_row(
                        query[start + due[name]].view(impl.num_heads, impl.head_size),
                        self.keys(cache, table[number, :count]),
                        request.prompt,
                        impl.scale,
                        request.first,
                        request.stop,
                    ),
                )
            start += self.lengths[name]

    def _keep(self, key: str, row: Tensor) -> None:
        self._release(key)
        self.rows[key] = row
        self.rows_bytes += row.nbytes
        while len(self.rows) > MAX_ROWS or self.rows_bytes > MAX_ROWS_BYTES:
            self._release(next(iter(self.rows)))

    def _release(self, key: str) -> Tensor | None:
        row = self.rows.pop(key, None)
        if row is not None:
            self.rows_bytes -= row.nbytes
        return row

    def take(self, keys: list[str]) -> list[tuple[bytes, int] | None]:
        """Return and drop rows by key: float32 bytes, and the number of heads in the sum."""
        rows = [self._release(key) for key in keys]
        return [None if row is None else (row.cpu().numpy().tobytes(), self.heads) for row in rows]


def _row_request(request: Any) -> _RowRequest | None:
    """Return the row request of a new request, if it has a valid one.

    Users can set `extra_args` through vLLM's own endpoints, so malformed values are ignored.
    """
    extra = getattr(request.sampling_params, "extra_args", None)
    if not extra or request.prompt_token_ids is None:
        return None
    key, first, stop = extra.get(KEY), extra.get(FIRST), extra.get(STOP)
    prompt = len(request.prompt_token_ids)
    if not (isinstance(key, str) and len(key) <= 64):
        return None
    if not (isinstance(first, int) and isinstance(stop, int)):
        return None
    return _RowRequest(key, first, stop, prompt) if 0 <= first < stop <= prompt else None


def register() -> None:
    """Entry point: add the three methods to vLLM's workers. Called in every vLLM process."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, INSTALL, _install)
    setattr(WorkerBase, TAKE, _take)
    setattr(WorkerBase, HELD, _held)


def _install(worker: Any, layer: int, scope: str) -> dict[str, Any]:
    """Start to capture rows of a decoder layer, or add a scope if they are captured already.

    Args:
        scope: the caller's secret prefix of its rows' keys. Without it, users of vLLM's own
            endpoints, who can set `extra_args` too, could displace others' rows.

    Returns:
        `{"heads": …}` of this worker, 0 if the layer is on another one (pipeline parallelism);
        or `{"error": …}`, one line. Exceptions would reach the caller as a stack trace.
    """
    import vllm

    try:
        if not vllm.__version__.startswith(f"{SUPPORTED}."):
            raise UnsupportedError(f"release (supported: {SUPPORTED})")
        return {"heads": _wrap(worker, layer, scope)}
    except UnsupportedError as error:
        missing = str(error)
    except Exception as error:  # other releases may raise anything
        missing = " ".join(f"{type(error).__name__}: {error}".split())
    return {"error": f"vLLM {vllm.__version__} cannot give attention rows here: {missing}"}


def _take(worker: Any, keys: list[str]) -> list[tuple[bytes, int] | None]:
    """Call `RowReader.take`, for `collective_rpc`."""
    reader: RowReader | None = getattr(worker, "vlm_collab_rows", None)
    return [None] * len(keys) if reader is None else reader.take(keys)


def _held(worker: Any) -> dict[str, int]:
    """Count what this worker keeps: requests that wait for their row, and rows not fetched yet."""
    reader: RowReader | None = getattr(worker, "vlm_collab_rows", None)
    if reader is None:
        return {"pending": 0, "rows": 0}
    return {"pending": len(reader.pending), "rows": len(reader.rows)}


def _wrap(worker: Any, number: int, scope: str) -> int:
    """Wrap step and layer. Return the number of heads of the layer in this worker."""
    runner = worker.model_runner
    config = runner.vllm_config
    _check(config)
    if (served := getattr(worker, "vlm_collab_layer", number)) != number:
        raise UnsupportedError(f"rows of layer {served} are served already, not of {number}")
    if hasattr(worker, "vlm_collab_rows"):  # another front-end of the same engine
        worker.vlm_collab_rows.scopes.add(scope)
        return int(worker.vlm_collab_rows.heads)
    layer = config.compilation_config.static_forward_context.get(_LAYER.format(number))
    if layer is None:
        if config.parallel_config.pipeline_parallel_size > 1:
            return 0
        raise UnsupportedError(f"there is no attention layer {_LAYER.format(number)}")
    impl = layer.impl
    _check_layer(impl)
    keys, table = _keys(layer), _block_table(layer, runner)
    heads = int(impl.num_heads)
    run, attend = runner.execute_model, impl.forward
    # Last, when nothing else can fail: with V2 this wraps a method.
    order = _order_v2(runner) if config.use_v2_model_runner else _order_v1(runner)
    reader = RowReader(order, keys, table, heads, {scope})

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("dummy_run"):
            reader.step(scheduled)
        try:
            return run(scheduled, *args, **kwargs)
        finally:
            reader.due = {}

    def forward(
        layer: Any,
        query: Tensor,
        key: Any,
        value: Any,
        cache: Tensor,
        metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = attend(layer, query, key, value, cache, metadata, *args, **kwargs)
        if reader.due and metadata is not None:
            try:
                reader.read(layer, query, cache, metadata)
            except Exception:  # the engine must go on; the caller gets an error for its row
                log.exception("attention rows could not be captured")
        return result

    runner.execute_model, impl.forward = execute_model, forward
    worker.vlm_collab_rows, worker.vlm_collab_layer = reader, number
    return reader.heads


def _check(config: Any) -> None:
    """Refuse settings of the engine with which rows would be missing or wrong."""
    graphs = config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.name not in ("NONE", "PIECEWISE"):
        raise UnsupportedError(
            f"cudagraph_mode {graphs.name} skips the capture; set it to PIECEWISE"
        )
    parallel = config.parallel_config
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise UnsupportedError("decode context parallelism")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise UnsupportedError("prefill context parallelism")
    if parallel.use_ubatching:  # more than dual batch overlap turns it on
        raise UnsupportedError("steps that are divided into micro-batches")
    # The front-end refuses data parallelism: each replica's workers see a size of 1.
    if config.speculative_config is not None:
        raise UnsupportedError("speculative decoding")


def _check_layer(impl: Any) -> None:
    """Refuse attention whose weights are not the softmax of scaled products."""
    if impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise UnsupportedError(f"a key cache of type {impl.kv_cache_dtype}")
    if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
        raise UnsupportedError("sliding-window attention")
    # An implementation without these attributes does not have the feature.
    if getattr(impl, "logits_soft_cap", None):
        raise UnsupportedError("soft-capped attention")
    if getattr(impl, "alibi_slopes", None) is not None:
        raise UnsupportedError("attention with ALiBi")
    if getattr(impl, "sinks", None) is not None:
        raise UnsupportedError("attention with sinks")


def _keys(layer: Any) -> Keys:
    name = layer.attn_backend.get_name()
    if name == "CPU_ATTN":
        if layer.isa not in _CPU_KEYS:
            raise UnsupportedError(f"keys laid out for the instruction set {layer.isa}")
        return _CPU_KEYS[layer.isa]
    if name not in _CUDA_KEYS:
        raise UnsupportedError(f"the attention backend {name}")
    return _CUDA_KEYS[name]


def _block_table(layer: Any, runner: Any) -> Callable[[Any], Tensor]:
    if layer.attn_backend.get_name() != "FLASHINFER":
        return lambda metadata: torch.as_tensor(metadata.block_table)
    if runner.vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "FlashInfer with the V2 model runner has no block table; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, or another --attention-backend"
        )
    groups = runner.kv_cache_config.kv_cache_groups
    mine = [i for i, one in enumerate(groups) if layer.layer_name in one.layer_names]
    if not mine:
        raise UnsupportedError(f"there is no cache group of {layer.layer_name}")
    group, tables = mine[0], runner.input_batch.block_table
    return lambda metadata: tables[group].get_device_tensor(runner.input_batch.num_reqs)


def _order_v1(runner: Any) -> Callable[[], list[str]]:
    def order() -> list[str]:
        # Read in each step: vLLM replaces the list as requests come and go.
        return list(runner.input_batch.req_ids)

    order()  # fails now if the attribute is missing
    return order


def _order_v2(runner: Any) -> Callable[[], list[str]]:
    """Wrap `prepare_inputs`: the V2 runner makes a new batch in each step and does not keep it."""
    prepare = runner.prepare_inputs
    latest: list[str] = []

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        latest[:] = batch.req_ids
        return batch

    runner.prepare_inputs = prepare_inputs
    return lambda: latest
