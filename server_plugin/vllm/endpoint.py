"""Two-stage inference inside `vllm serve`: our routes beside vLLM's own.

Registered as a `vllm.endpoint_plugins` entry point, which vLLM loads only if `VLLM_PLUGINS` names
it. The service is the same as that of `vlm-collab serve`, over `VllmBackend`. All its routes are
below `/v1`, so `--api-key` guards them, the WebSocket included.

Its options come from vLLM's `--additional-config '{"vlm_collab": {"preset": "llava", …}}'`;
`vlm-collab serve --backend vllm` makes that of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Mount
from starlette.websockets import WebSocket

from server_plugin.assembly import engine_of
from server_plugin.models import preset_of, with_options
from server_plugin.service.app import Service
from server_plugin.service.config import ENDPOINT, ServiceConfig, ServiceLimits, is_loopback
from server_plugin.vllm.model import vllm_backend
from vlm_collab.errors import ConfigError
from vlm_collab.images import Codec
from vlm_collab.session import ServerLimits

log = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those of `ServiceLimits` that can be set here; None leaves a default."""

    max_connections: int | None = None
    max_questions: int | None = None
    max_queue: int | None = None
    max_view_bytes: int | None = None
    region_deadline_s: float | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `--additional-config` may hold under `vlm_collab`.

    Attributes:
        preset: name of a preset; by default the one of the model's name or family.
        overrides: fields of the preset by name, such as `eta` or `layer`.
        policy: threshold, always, never or random.
        policy_options: `rate` and `seed`, for the random policy.
        origins: origins of browser pages that may connect.
        provisional: see `Engine`.
        quality: asked of the edge for regions, 1 to 100; by default the preset's.
        limits: see `Limits`.
    """

    preset: str | None = None
    overrides: dict[str, Any] = {}
    policy: str | None = None
    policy_options: dict[str, Any] = {}
    origins: tuple[str, ...] = ()
    provisional: bool = False
    quality: int | None = None
    limits: Limits = Limits()


class CollabEndpoint:
    """What vLLM calls an endpoint plugin: one is made for each application."""

    name = "vlm_collab"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: Any = None

    def attach_router(self, app: Any) -> None:
        """Remember the application; its routes come with the service, in `init_state`."""
        self._app = app
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            # By now vLLM has made its server, whose WebSockets would buffer frames of 16 MiB before
            # we see that they are too large.
            app.state.server.config.ws_max_size = ServerLimits().max_frame_bytes
            async with inner(app) as state:
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the service on the running engine. Called before the server listens.

        Raises:
            ConfigError: rows cannot be read in this engine, an option is wrong, or the model is
                of a family that is not served here; one line each, and vLLM does not start.
        """
        options = options_of(engine_client.vllm_config.additional_config)
        source = _source_of(engine_client.vllm_config.model_config.model, args.revision)
        preset = with_options(preset_of(source, options.preset), options.overrides)
        shown = (args.served_model_name or [source])[0]
        backend = vllm_backend(engine_client, source, preset, shown, owned=False)
        await backend.warm_up()
        host = args.host or "0.0.0.0"
        keyless = not (args.api_key or os.environ.get("VLLM_API_KEY"))
        if keyless and not is_loopback(host):
            log.warning("anyone who reaches %s can ask questions: no --api-key is set", host)
        service = Service(
            engine_of(
                backend,
                preset,
                options.policy,
                options.policy_options,
                provisional=options.provisional,
            ),
            ServiceConfig(
                # vLLM's own middleware asks for the key.
                allow_anonymous=True,
                origins=frozenset(options.origins),
                region_codec=Codec[preset.codec.upper()],
                region_quality=preset.quality if options.quality is None else options.quality,
                limits=ServiceLimits(**_given(options.limits)),
            ),
        )
        service.abort = self.drop
        self._app.router.routes.extend(routes_of(service))

    def drop(self, websocket: WebSocket) -> None:
        """Drop a client that does not read, from vLLM's server, which is made after `init_state`;
        ASGI itself has no way to."""
        if websocket.client is None:
            return
        for protocol in list(self._app.state.server.server_state.connections):
            if getattr(protocol, "client", None) == tuple(websocket.client):
                protocol.transport.abort()


def routes_of(service: Service) -> list[BaseRoute]:
    """The service's routes, all below its WebSocket's path: vLLM has a `/metrics` of its own."""
    routes: list[BaseRoute] = list(service.routes())
    socket, others = routes[0], routes[1:]
    return [socket, Mount(ENDPOINT, routes=others)]


def options_of(additional_config: Any) -> Options:
    """Options out of vLLM's `--additional-config`.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type.
    """
    given = additional_config.get("vlm_collab", {}) if isinstance(additional_config, dict) else {}
    try:
        return msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--additional-config: vlm_collab: {error}") from error


def _source_of(model: str, revision: str | None) -> str:
    # vLLM's configuration has a revision in any case; only its arguments tell that one was asked
    # for.
    if revision is not None and not Path(model).is_dir():
        raise ConfigError(
            "--revision: prompts are made from the files of the model's main revision; download "
            "the other one, and name its folder instead of the model"
        )
    return model


def _given(limits: Limits) -> dict[str, Any]:
    return {
        name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None
    }
