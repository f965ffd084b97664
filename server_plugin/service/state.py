"""What all clients of the service share: the engine, the model queue, views, counts and metrics."""

from __future__ import annotations

from server_plugin.backends.base import has_failed
from server_plugin.engines.two_stage import Engine
from server_plugin.service.config import ServiceConfig
from server_plugin.service.metrics import Metrics
from server_plugin.service.queue import ModelQueue
from server_plugin.service.view_store import ViewStore
from vlm_collab import __version__


class ServiceState:
    """The state of one service, for connections and endpoints, which do not know the application.

    Args:
        engine: answers the questions.
        config: see `ServiceConfig`.

    Attributes:
        questions: how many questions are accepted and not yet ended.
        draining: the service is shutting down and accepts no more questions.
    """

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self.engine = engine
        self.config = config
        self.questions = 0
        self.draining = False
        limits, info = config.limits, engine.backend.info
        self.queue = ModelQueue(info.concurrency, limits.max_queue)
        self.views = ViewStore(
            engine.backend,
            max_bytes=limits.max_view_bytes,
            max_sessions=limits.max_sessions,
            ttl_s=limits.session_ttl_s,
        )
        self.metrics = Metrics()
        self.metrics.model(info.name, __version__)

    @property
    def closed(self) -> str | None:
        """Why no questions are accepted any more, in one line; None while they are."""
        if self.draining:
            return "the server is shutting down"
        if has_failed(self.engine.backend):
            return "the model has failed; this server has to be started again"
        return None
