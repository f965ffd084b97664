"""Two-stage inference inside `vllm serve`: our routes beside vLLM's own.

Registered as a `vllm.endpoint_plugins` entry point, which vLLM loads only if `VLLM_PLUGINS` names
it. The service is the same as that of `vlm-collab serve`, over `VllmBackend`. Its routes are there
twice: below `/v1`, where `--api-key` guards them, the WebSocket included; and below `/collab`,
where the service itself asks for the key, so that the page can be had without one and ask with it.

Its options come from vLLM's `--additional-config '{"vlm_collab": {"preset": "llava", …}}'`;
`vlm-collab serve --backend vllm` makes that of its own.

What is touched of vLLM's server, beside the engine (`server_plugin.backends.vllm.backend`): the
settings and connections of the uvicorn server in `app.state.server`, and `shutdown` of the engine
client, which the server calls in a thread when it is told to stop, before it closes any connection.
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
from server_plugin.service.config import ENDPOINT, ServiceConfig, ServiceLimits, service_limits
from server_plugin.service.logs import REFUSED
from server_plugin.service.service import FAREWELL_S, HEALTH, Service
from vlm_collab.errors import CollabError, ConfigError
from vlm_collab.pictures.images import Codec
from vlm_collab.web.access import is_loopback
from vlm_collab.web.connection_limits import Places
from vlm_collab.web.log_throttle import LIBRARIES, Quiet
from vlm_collab.web.server import bound

log = logging.getLogger(__name__)

_QUIET = Quiet(frozenset({REFUSED}), as_extra=False)
"""For loggers and not for handlers, which are vLLM's own."""

PAGE = "/collab"
"""Where the page lies and the service asks for the key itself: a browser cannot send it as vLLM
wants it, neither for a page nor with a WebSocket."""


_HEALTH = ("/health", "/metrics", *(root + path for root in (ENDPOINT, PAGE) for path in HEALTH))


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those of `service_limits` that can be set here; None leaves a default."""

    max_connections: int | None = None
    max_per_address: int | None = None
    max_questions: int | None = None
    max_queue: int | None = None
    max_question_bytes: int | None = None
    max_view_bytes: int | None = None
    region_deadline_s: float | None = None


class EndpointOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `--additional-config` may hold under `vlm_collab`.

    Attributes:
        preset: name or YAML file of a preset; by default the one of the model's name or family.
        overrides: fields of the preset by name, such as `eta` or `layer`.
        policy: threshold, always, never or random.
        policy_options: `rate` and `seed`, for the random policy.
        origins: origins of browser pages that may connect.
        host_names: names by which clients may call the server without a key.
        provisional: see `Engine`.
        quality: asked of the edge for regions, 1 to 100; by default the preset's.
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
    """What vLLM calls an endpoint plugin: one is made for each application."""

    name = "vlm_collab"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: Any = None
        self._limits = ServiceLimits()

    def attach_router(self, app: Any) -> None:
        """Remember the application; its routes come with the service, in `init_state`."""
        self._app = app
        for name in (*LIBRARIES, "server_plugin.service.service"):
            logging.getLogger(name).addFilter(_QUIET)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            # By now vLLM has made its server, which does not listen yet. Its WebSockets would
            # buffer frames of 16 MiB before we see that they are too large, and compress pictures,
            # which do not shrink; and it waits for ever for clients that do not read. How many
            # connect is left to vLLM, whose own endpoints many use at once.
            limits = self._limits
            bound(
                app.state.server.config,
                places=Places(None, limits.max_per_address or 0, _HEALTH),
                write_timeout_s=limits.write_timeout_s,
                max_frame_bytes=limits.connection.max_frame_bytes,
            )
            async with inner(app) as state:
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the service on the running engine. Called before the server listens.

        Raises:
            SystemExit: rows cannot be read in this engine, an option is wrong, or the model is of
                a family that is not served here. One line on stderr says which, and vLLM ends.
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
        """Drop a client that does not read, from vLLM's server, which is made after `init_state`;
        ASGI itself has no way to."""
        if websocket.client is None:
            return
        for protocol in list(self._app.state.server.server_state.connections):
            if getattr(protocol, "client", None) == tuple(websocket.client):
                protocol.transport.abort()


async def _opened(engine_client: Any, args: Any) -> Service:
    """The service on an engine.

    Raises:
        ConfigError, ModelError: see `CollabEndpoint.init_state`.
    """
    options = options_of(engine_client.vllm_config.additional_config)
    source = engine_client.vllm_config.model_config.model
    # vLLM's configuration has a revision in any case; only its arguments tell whether one was
    # asked for.
    check_revision(source, args.revision)
    preset = with_options(preset_of(source, options.preset), options.overrides)
    keys = _keys(args)
    config = ServiceConfig(
        token=keys[0] if keys else None,
        more_tokens=tuple(keys[1:]),
        host=args.host or "0.0.0.0",
        allow_anonymous=True,  # vLLM listens where it was told to
        origins=frozenset(options.origins),
        host_names=frozenset(options.host_names),
        region_codec=Codec[preset.codec.upper()],
        region_quality=preset.quality if options.quality is None else options.quality,
        limits=service_limits(**_given(options.limits)),
    )
    shown = (args.served_model_name or [source])[0]
    backend = vllm_backend(engine_client, source, preset, shown, owned=False)
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
    """vLLM's API keys, as its own middleware has them."""
    return [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


def finish_before_shutdown(engine_client: Any, service: Service) -> None:
    """Have questions in flight end before their engine does, when the server is told to stop.

    vLLM lets requests end that its engine has (`--shutdown-timeout`), but takes no new ones
    meanwhile, and a question is several. So its shutdown of the engine waits for ours, within the
    same time; of that, clients have the last seconds to read what they are told.
    """
    shutdown, loop = engine_client.shutdown, asyncio.get_running_loop()

    def shut_down(timeout: float | None = None) -> None:
        if service.draining or not loop.is_running() or _runs_here(loop):
            # Questions have ended, or nobody could wait for them: vLLM cleans up at its end, or
            # after its engine's.
            shutdown(timeout=timeout)
            return
        began_s = time.monotonic()
        grace_s = max((timeout or 0.0) - FAREWELL_S, 0.0)
        draining = asyncio.run_coroutine_threadsafe(service.drain(grace_s), loop)
        try:
            draining.result(grace_s + 3 * FAREWELL_S)
        except Exception:  # whatever it is, the engine has to go
            log.exception("questions in flight were left")
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - began_s), 0.0)
        shutdown(timeout=timeout)

    engine_client.shutdown = shut_down


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread is the event loop's."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def routes_of(service: Service) -> list[BaseRoute]:
    """The service's routes: below its WebSocket's path, for vLLM has a `/metrics` of its own, and
    as they are below `PAGE`. Our gate stands before them, and before nothing of vLLM's."""
    gate = [service.gate()]
    websocket, *others = service.routes()
    return [
        WebSocketRoute(ENDPOINT, websocket.endpoint, middleware=gate),
        Mount(ENDPOINT, routes=others, middleware=gate),
        Mount(PAGE, routes=service.routes(), middleware=gate),
    ]


def options_of(additional_config: Any) -> EndpointOptions:
    """Read the options in vLLM's `--additional-config`.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type.
    """
    given = additional_config.get("vlm_collab", {}) if isinstance(additional_config, dict) else {}
    try:
        return msgspec.convert(given, EndpointOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--additional-config: vlm_collab: {error}") from error


def _given(limits: Limits) -> dict[str, Any]:
    return {
        name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None
    }
