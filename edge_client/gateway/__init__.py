"""The gateway: OpenAI's APIs on the device, `vlm-collab/1` towards the server.

A client sends its full-resolution picture as usual; the gateway sends only a small view of it to
the server, and a region if the model asks for one. `Gateway` is the application; `running` and
`serve` run it.
"""

from edge_client.gateway.answerer import NoServerError
from edge_client.gateway.app import Gateway
from edge_client.gateway.config import DEFAULT_PORT, GatewayConfig, GatewayLimits
from edge_client.gateway.logs import configure as configure_logs
from edge_client.gateway.runner import bind, running, serve, url_of

__all__ = [
    "DEFAULT_PORT",
    "Gateway",
    "GatewayConfig",
    "GatewayLimits",
    "NoServerError",
    "bind",
    "configure_logs",
    "running",
    "serve",
    "url_of",
]
