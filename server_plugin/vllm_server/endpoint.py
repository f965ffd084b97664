"""Two-stage inference inside `vllm serve`: this package's routes beside vLLM's own.

Registered as a `vllm.endpoint_plugins` entry point, which vLLM loads only if `VLLM_PLUGINS` names
it. The service is that of `vlm-collab serve`, over `VllmBackend`. Its routes exist twice: below
`/v1`, where vLLM's `--api-key` guards them, the WebSocket included; and below `/collab`, where the
service itself checks the key, so that a browser can load the page without a key and then send it.

Options come from vLLM's `--additional-config '{"vlm_collab": {"preset": "llava", …}}'`;
`vlm-collab serve --backend vllm` sets it.

Parts of vLLM's server that are used, besides the engine (`server_plugin.backends.vllm.backend`):
settings and connections of the uvicorn server in `app.state.server`, and `shutdown` of the engine
client, which the server calls in a thread when it has to stop, before it closes any connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from starlette.websockets import WebSocket

from server_plugin.backends.open import preset_of, with_options
from server_plugin.backends.vllm.model import vllm_backend
from server_plugin.backends.vllm.setup import check_revision
from server_plugin.engines.assembly import engine_of
from server_plugin.service.asgi import CLOSING_S, HEALTH, Service
from server_plugin.service.config import ENDPOINT, ServiceConfig, ServiceLimits, service_limits
from server_plugin.service.logs import REFUSED
from vlm_collab.errors import CollabError, ConfigError
from vlm_collab.pictures.images import Codec
from vlm_collab.web.connection_limits import ConnectionSlots
from vlm_collab.web.log_throttle import LIBRARIES, LogThrottle
from vlm_collab.web.server import drop_client, limit_connections
from vlm_collab.web.settings import is_loopback

log = logging.getLogger(__name__)

_QUIET = LogThrottle(frozenset({REFUSED}), as_extra=False)
"""Added to loggers, not to handlers, which belong to vLLM."""

PAGE = "/collab"
"""Path of the page. Here the service checks the key itself: a browser cannot send it as vLLM
expects, neither to load a page nor with a WebSocket."""


_HEALTH = ("/health", "/metrics", *(root + path for root in (ENDPOINT, PAGE) for path in HEALTH))


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of `service_limits` that can be set here; None keeps the default."""

    max_connections: int | None = None
    max_per_address: int | None = None
    max_questions: int | None = None
    max_queue: int | None = None
    max_question_bytes: int | None = None
    max_view_bytes: int | None = None
    region_deadline_s: float | None = None


class EndpointOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options under `vlm_collab` in `--additional-config`.

    Attributes:
        preset: name or YAML file of a preset; default: by the model's name or family.
        overrides: fields of the preset by name, such as `eta` or `layer`.
        policy: threshold, always, never or random.
        policy_options: `rate` and `seed`, for the random policy.
        origins: origins of browser pages that may connect.
        host_names: host names by which clients may call the server without a key.
        provisional: see `Engine`.
        quality: image quality of regions, 1 to 100; default: the preset's.
        limits: see `Limits`.
    """

    preset: str | None = None
    overrides: dict[str, Any] = {}
    policy: str | None = None
    policy_options: dict[str, Any] = {}
    origins: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    provisional: bool = False
    quality: int | None = None
    limits: Limits = Limits()


class CollabEndpoint:
    """Endpoint plugin of vLLM: one instance for each application."""

    name = "vlm_collab"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: Any = None
        self._limits = ServiceLimits()

    def attach_router(self, app: Any) -> None:
        """Keep the application; `init_state` adds the routes once the service exists."""
        self._app = app
        for name in (*LIBRARIES, "server_plugin.service.asgi"):
            logging.getLogger(name).addFilter(_QUIET)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            # vLLM has made its server by now; it does not listen yet. By default it would buffer
            # WebSocket frames of 16 MiB before their size is checked, compress pictures without
            # gain, and wait for ever for clients that do not read. The number of connections is
            # left to vLLM, because its own endpoints share them.
            limits = self._limits
            limit_connections(
                app.state.server.config,
                slots=ConnectionSlots(None, limits.max_per_address or 0, _HEALTH),
                write_timeout_s=limits.write_timeout_s,
                max_frame_bytes=limits.connection.max_frame_bytes,
            )
            async with inner(app) as state:
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the service on the running engine. Called before the server listens.

        Raises:
            SystemExit: rows cannot be captured in this engine, an option is invalid, or the model's
                family is not supported. One line on stderr says which, and vLLM ends.
        """
        try:
            service = await _opened(engine_client, args)
        except CollabError as error:
            print(f"vlm-collab: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        service.abort = self.drop
        self._limits = service.config.limits
        finish_before_shutdown(engine_client, service)
        self._app.router.routes.extend(routes_of(service))

    def drop(self, websocket: WebSocket) -> None:
        """See `drop_client`."""
        drop_client(self._app.state.server.server_state, websocket)


async def _opened(engine_client: Any, args: Any) -> Service:
    """Open the service on an engine.

    Raises:
        ConfigError, ModelError: see `CollabEndpoint.init_state`.
    """
    options = options_of(engine_client.vllm_config.additional_config)
    source = engine_client.vllm_config.model_config.model
    # vLLM's configuration always has a revision; only its arguments tell whether the user set one.
    check_revision(source, args.revision)
    preset = with_options(preset_of(source, options.preset), options.overrides)
    keys = _keys(args)
    config = ServiceConfig(
        token=keys[0] if keys else None,
        more_tokens=tuple(keys[1:]),
        host=args.host or "0.0.0.0",
        allow_anonymous=True,  # vLLM decides who has access
        origins=frozenset(options.origins),
        host_names=frozenset(options.host_names),
        region_codec=Codec[preset.codec.upper()],
        region_quality=preset.quality if options.quality is None else options.quality,
        limits=service_limits(**_given(options.limits)),
    )
    served_name = (args.served_model_name or [source])[0]
    backend = vllm_backend(engine_client, source, preset, served_name, owned=False)
    await backend.warm_up()
    host = args.host or "0.0.0.0"
    if not keys and not is_loopback(host):
        log.warning("anyone who reaches %s can ask questions: no --api-key is set", host)
    engine = engine_of(
        backend,
        preset,
        options.policy,
        options.policy_options,
        provisional=options.provisional,
    )
    return Service(engine, config)


def _keys(args: Any) -> list[str]:
    """Return vLLM's API keys, from the same sources as its middleware."""
    return [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


def finish_before_shutdown(engine_client: Any, service: Service) -> None:
    """Make vLLM's shutdown wait until running questions have ended.

    vLLM lets running requests end (`--shutdown-timeout`), but accepts no new ones meanwhile, and a
    question takes several requests. So the engine's shutdown waits for the service to drain, within
    the same time limit; clients have its last seconds to read their messages.
    """
    shutdown, loop = engine_client.shutdown, asyncio.get_running_loop()

    def shut_down(timeout: float | None = None) -> None:
        if service.state.draining or not loop.is_running() or _runs_here(loop):
            # Questions have ended, or waiting is impossible: vLLM cleans up at its end, or after
            # its engine has died.
            shutdown(timeout=timeout)
            return
        began_s = time.monotonic()
        grace_s = max((timeout or 0.0) - CLOSING_S, 0.0)
        draining = asyncio.run_coroutine_threadsafe(service.drain(grace_s), loop)
        try:
            draining.result(grace_s + 3 * CLOSING_S)
        except Exception:  # after any error, the engine still has to shut down
            log.exception("some questions in flight were not answered")
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - began_s), 0.0)
        shutdown(timeout=timeout)

    engine_client.shutdown = shut_down


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread runs the event loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def routes_of(service: Service) -> list[BaseRoute]:
    """Return the service's routes, below its WebSocket's path and again below `PAGE`.

    Not at the root, because vLLM has a `/metrics` of its own. The service's gate guards only these
    routes, not vLLM's.
    """
    gate = [service.gate()]
    websocket, *others = service.routes()
    return [
        WebSocketRoute(ENDPOINT, websocket.endpoint, middleware=gate),
        Mount(ENDPOINT, routes=others, middleware=gate),
        Mount(PAGE, routes=service.routes(), middleware=gate),
    ]


def options_of(additional_config: Any) -> EndpointOptions:
    """Read the options from vLLM's `--additional-config`.

    Raises:
        ConfigError: an option is unknown, or a value has the wrong type.
    """
    fields = additional_config.get("vlm_collab", {}) if isinstance(additional_config, dict) else {}
    try:
        return msgspec.convert(fields, EndpointOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--additional-config: vlm_collab: {error}") from error


def _given(limits: Limits) -> dict[str, Any]:
    """Return the limits that are set."""
    return {
        name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None
    }
