"""`vlm-collab gateway`: serve OpenAI's APIs on the device."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_client.cli.options import Token, TokenFile, token_of
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions
from edge_client.gateway import (
    DEFAULT_PORT,
    Gateway,
    GatewayConfig,
    GatewayLimits,
    NoServerError,
    bind,
    configure_logs,
    serve,
    url_of,
)
from edge_client.link.dial import DEFAULT_URL
from vlm_collab.cli.secret_files import API_KEY_VARIABLE, chosen_key
from vlm_collab.errors import ConfigError
from vlm_collab.openai import WireLimits
from vlm_collab.protocol.table import FITS

_WELCOME_TIMEOUT_S = 3.0
_LEVELS = ("debug", "info", "warning", "error")


def gateway(
    server: Annotated[
        str, typer.Option(envvar="VLM_COLLAB_SERVER", help="Address of the service.")
    ] = DEFAULT_URL,
    token: Token = None,
    token_file: TokenFile = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM file of certificate authorities to trust for wss://.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = (
        DEFAULT_PORT
    ),
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            help="API key that clients must send. Required on all addresses but localhost. Other "
            "users of this machine can see it on the command line; prefer --api-key-file or the "
            "variable.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that contains only the API key.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Listen on any address without an API key.")
    ] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may use the gateway; repeat for several."),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients may call the gateway without a key, besides localhost and "
            "IP addresses; repeat for several."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host (name, name:port or address) from which pictures may be fetched by URL; "
            "repeat for several. By default, nothing is fetched."
        ),
    ] = None,
    model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name for the model, for clients with a fixed model name; repeat for "
            "several."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=0.001, help="Longest time for an answer, in seconds.")
    ] = DEFAULT_DEADLINE_S,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Most requests in progress at once.")
    ] = 32,
    max_per_address: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most connections at once from one address; default: 64, and no limit for this "
            "machine. 0: no limit; use it behind a proxy on another machine.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most requests that may wait; further ones get HTTP 429.")
    ] = 256,
    max_question_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest question including its conversation, in UTF-8 bytes; default: the "
            "server's limit.",
        ),
    ] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request body, in MiB.")] = 64,
    max_megapixels: Annotated[
        int,
        typer.Option(
            min=1, max=200, help="Largest picture, in megapixels; decoding needs 4 bytes a pixel."
        ),
    ] = 120,
    picture_memory_mb: Annotated[
        int,
        typer.Option(
            min=1, help="Memory for originals, in MiB; the view of a stored one is not sent again."
        ),
    ] = 256,
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy file: what may leave the device (YAML, see docs/privacy.md)."),
    ] = None,
    camera: Annotated[
        str | None,
        typer.Option(
            help="Camera of the policy whose rules apply at /v1; each camera has its own API at "
            "/cameras/NAME/v1."
        ),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Audit log: a file that lists every image before it leaves.")
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="Least severe messages to log: debug, info, warning or error.")
    ] = "warning",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line when ready.")] = False,
) -> None:
    """Serve OpenAI's API on this device, and send only what the model needs to see.

    Clients send full pictures as usual. Only a small view and the region that the model asks for
    go to the server. Needs the `gateway` extra.
    """
    if log_level not in _LEVELS:
        raise ConfigError(f"unknown log level {log_level!r}; known: {', '.join(_LEVELS)}")
    wire = WireLimits(max_body_bytes=max_body_mb * 2**20)
    config = GatewayConfig(
        host=host,
        port=port,
        api_key=chosen_key(api_key, api_key_file, "--api-key", API_KEY_VARIABLE),
        allow_anonymous=allow_anonymous,
        origins=frozenset(origin or ()),
        host_names=frozenset(host_name or ()),
        fetch_hosts=frozenset(allow_host or ()),
        aliases=tuple(model_name or ()),
        deadline_s=deadline,
        limits=GatewayLimits(
            wire=wire,
            max_question_bytes=max_question_bytes,
            max_requests=max_requests,
            max_per_address=max_per_address,
            max_waiting=max_waiting,
            max_picture_bytes=picture_memory_mb * 2**20,
            max_pixels=max_megapixels * 10**6,
        ),
    )
    options: ClientOptions = {
        "token": token_of(token, token_file),
        "ca_file": ca_file,
        "policy": policy,
        "camera": camera,
        "audit": audit,
    }
    configure_logs(log_level)
    asyncio.run(_serve(config, server, options, as_json=as_json))


async def _serve(
    config: GatewayConfig, server: str, options: ClientOptions, *, as_json: bool
) -> None:
    # Made inside the event loop, because its connections belong to the loop.
    gateway = Gateway(config, server, **options)
    sock = bind(config)
    try:
        model, note, warning = await _server_model(gateway)
        url = url_of(sock)
        if warning is not None:
            print(
                f"vlm-collab gateway: warning about the server: {warning}",
                file=sys.stderr,
                flush=True,
            )
        if as_json:
            ready = {"event": "ready", "url": url, "model": model, "pid": os.getpid()}
            print(json.dumps(ready), flush=True)
        else:
            print(f"vlm-collab: gateway at {url} {note} (Ctrl-C stops)", flush=True)
        await serve(gateway, sock)
    finally:
        sock.close()
        await gateway.close()


async def _server_model(gateway: Gateway) -> tuple[str | None, str, str | None]:
    """Ask the server for its model; a wrong address or token is reported at once.

    Returns:
        The model's name, a description for the start line, and a warning; None where unknown.
    """
    try:
        welcome = await gateway.answerer.welcome(_WELCOME_TIMEOUT_S)
    except NoServerError as error:
        return None, f"has no model yet: {error}", None
    return welcome.model, f"for {welcome.model}", FITS[welcome.fit].warning
