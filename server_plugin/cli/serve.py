"""`vlm-collab serve`: load a model and serve it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from server_plugin.backends.open import preset_of, with_options
from server_plugin.cli.options import (
    BaseSide,
    BatchSize,
    Device,
    Dtype,
    Epsilon,
    FitName,
    Layer,
    PlacementName,
    PresetFile,
    PromptName,
    Ratios,
    ViewSide,
    ratios_of,
)
from server_plugin.engines.assembly import engine_of
from server_plugin.models.calibration import load_calibration
from server_plugin.models.presets import Preset
from server_plugin.service import logs
from server_plugin.service.config import DEFAULT_PORT, ENDPOINT, ServiceConfig, service_limits
from vlm_collab.cli.secret_files import TOKEN_VARIABLE, chosen_key
from vlm_collab.errors import ConfigError
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.server_session import ServerLimits


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hub name or local folder of a checkpoint. `demo` is the small model that comes "
            "with the package, `fake` a scripted one without torch."
        ),
    ] = "demo",
    backend: Annotated[
        str,
        typer.Option(
            help="transformers or vllm. With vllm, this starts vLLM's own server with the same "
            "service in it, and passes on any option that is not listed here."
        ),
    ] = "transformers",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = (
        DEFAULT_PORT
    ),
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            help="Bearer token that clients must send. Required on any address but localhost. "
            "Other users of this machine can read it on the command line; --token-file or the "
            "variable is safer.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File that contains only the bearer token."),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option(help="Listen beyond localhost without a token.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="TLS certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="TLS private key (PEM).")] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of browser pages that may connect; repeat for several."),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name by which clients may call the server without a token, besides "
            "localhost and IP addresses; repeat for several."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    policy: Annotated[
        str | None,
        typer.Option(help="When to ask for a region: threshold, always, never or random."),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Threshold on the uncertainty: bits, or 0 to 1 for margin.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Uncertainty metric: min_entropy, entropy or margin.")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="Tokens that count: full (all), first_k or first.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Number of tokens for --aggregate first_k.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Share of questions for --policy random.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for --policy random.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File from `vlm-collab calibrate`; other options override it."),
    ] = None,
    preset: PresetFile = None,
    fit: FitName = None,
    prompt: PromptName = None,
    view_px: ViewSide = None,
    layer: Layer = None,
    base_px: BaseSide = None,
    ratios: Ratios = None,
    epsilon: Epsilon = None,
    placement: PlacementName = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    batch: BatchSize = None,
    provisional: Annotated[
        bool,
        typer.Option(
            help="Generate every first answer to its end, even if its first tokens decide that a "
            "second pass follows."
        ),
    ] = False,
    quality: Annotated[int | None, typer.Option(help="Image quality of regions, 1-100.")] = None,
    max_connections: Annotated[int, typer.Option(help="Most WebSockets at once.")] = 256,
    max_per_address: Annotated[
        int | None,
        typer.Option(
            help="Most connections at once from one address; 0 for any number, as behind a proxy "
            "on another machine. Default: 64, and any number from this machine."
        ),
    ] = None,
    max_questions: Annotated[int, typer.Option(help="Most questions in progress at once.")] = 512,
    max_queue: Annotated[int, typer.Option(help="Most questions that wait for the model.")] = 256,
    max_question_bytes: Annotated[
        int,
        typer.Option(help="Longest question with its conversation, in UTF-8 bytes."),
    ] = ServerLimits().max_question_bytes,
    view_memory_mb: Annotated[int, typer.Option(help="Memory for views, in MiB.")] = 2048,
    region_deadline_s: Annotated[
        float, typer.Option(help="Longest wait for a region, in seconds.")
    ] = 10.0,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug (libraries included), info, warning (the default) or error; with vLLM, the "
            "default is vLLM's."
        ),
    ] = None,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="One JSON line when ready, and JSON lines as logs."),
    ] = False,
) -> None:
    """Start the two-stage service (needs the `server` extra)."""
    levels = ("debug", "info", "warning", "error")
    if log_level not in (None, *levels):
        raise ConfigError(f"log level {log_level!r} is unknown; known: {', '.join(levels)}")
    limits: dict[str, Any] = {
        "max_connections": max_connections,
        "max_per_address": max_per_address,
        "max_questions": max_questions,
        "max_queue": max_queue,
        "max_question_bytes": max_question_bytes,
        "max_view_bytes": view_memory_mb * 2**20,
        "region_deadline_s": region_deadline_s,
    }
    config = ServiceConfig(
        host=host,
        port=port,
        token=chosen_key(token, token_file, "--token", TOKEN_VARIABLE),
        allow_anonymous=allow_anonymous,
        tls_cert=tls_cert,
        tls_key=tls_key,
        origins=frozenset(origin or ()),
        host_names=frozenset(host_name or ()),
        region_quality=90 if quality is None else quality,
        limits=service_limits(**limits),
    )
    overrides = {
        "fit": fit,
        "prompt": prompt,
        "view_px": view_px,
        "layer": layer,
        "base_px": base_px,
        "ratios": ratios_of(ratios),
        "epsilon": epsilon,
        "placement": placement,
        "metric": metric,
        "aggregate": aggregate,
        "eta": eta,
        "k": k,
        "max_new_tokens": max_new_tokens,
    }
    if calibration is not None:
        overrides = _calibrated(overrides, calibration, model)
    policy_options = {"rate": rate, "seed": seed}
    if model.startswith("-"):
        raise ConfigError(f"no such option: {model}; give vLLM's options after the model")
    if backend == "vllm":
        if device != "auto":
            raise ConfigError("vLLM chooses its devices itself; leave out --device")
        if json_output:
            raise ConfigError("--json does not work with --backend vllm, which writes vLLM's logs")
        from server_plugin.vllm_server.launch import invocation, replace_process

        vllm_server = invocation(
            model,
            config,
            preset=preset,
            overrides=overrides,
            options={
                "policy": policy,
                "policy_options": policy_options,
                "origins": sorted(config.origins),
                "host_names": sorted(config.host_names),
                "provisional": provisional,
                "quality": quality,
                "limits": limits,
            },
            dtype=dtype,
            batch=batch,
            log_level=log_level,
            vllm_options=context.args,
        )
        address = f"[{host}]" if ":" in host else host
        _warn(with_options(preset_of(model, preset), overrides))
        print(f"vlm-collab: starting vLLM; clients connect to {config.scheme}://{address}:{port}")
        replace_process(vllm_server)
    if backend != "transformers":
        raise ConfigError(f"there is no backend {backend!r}; there are: transformers, vllm")
    if context.args:
        raise ConfigError(f"no such option: {context.args[0]} (see vlm-collab serve --help)")
    logs.configure(log_level or "warning", json_lines=json_output)
    asyncio.run(
        _serve(
            model,
            config,
            policy=policy,
            policy_options=policy_options,
            model_options={
                "preset": preset,
                "device": device,
                "dtype": dtype,
                "batch": batch,
                **overrides,
            },
            provisional=provisional,
            quality=quality,
            json_output=json_output,
        )
    )


# Unknown options are passed to vLLM; without vLLM, `serve` refuses them.
serve.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}


def _calibrated(overrides: dict[str, Any], path: Path, model: str) -> dict[str, Any]:
    """Return the model options, with a calibration's values for those that the user left out."""
    loaded = load_calibration(path)
    loaded.require_model(model)
    given = {name: value for name, value in overrides.items() if value is not None}
    if not given.keys() & {"metric", "aggregate", "k"}:
        return {**loaded.overrides(), **given}
    if "eta" not in given:
        raise ConfigError(
            "the calibration's threshold is for its own metric and aggregate; give --eta too"
        )
    return {"layer": loaded.layer, **given}


def _warn(preset: Preset) -> None:
    if preset.warning is not None:
        print(f"vlm-collab serve: {preset.warning}", file=sys.stderr, flush=True)


async def _serve(
    model: str,
    config: ServiceConfig,
    *,
    policy: str | None,
    policy_options: dict[str, Any],
    model_options: dict[str, Any],
    provisional: bool,
    quality: int | None,
    json_output: bool,
) -> None:
    from server_plugin.backends.open import open_model
    from server_plugin.service import runner
    from server_plugin.service.asgi import Service

    sock = runner.bind(config)
    try:
        backend, preset = await asyncio.to_thread(open_model, model, **model_options)
        _warn(preset)
        await backend.warm_up()
        engine = engine_of(backend, preset, policy, policy_options, provisional=provisional)
        codec = Codec[preset.codec.upper()]
        config = replace(config, region_codec=codec)
        if quality is None:
            config = replace(config, region_quality=preset.quality)
        service = Service(engine, config)
        server = runner.server(service)
        url = runner.url_of(sock, config)
        page = f"http{url.removeprefix('ws').removesuffix(ENDPOINT)}/"
        name, openai = backend.info.name, f"{page}v1"
        ready = {"event": "ready", "url": url, "openai": openai, "model": name, "pid": os.getpid()}
        text = f"vlm-collab: serving {name} at {url}, page at {page}, OpenAI's APIs at {openai}"
        # Clients that connect before uvicorn accepts wait in the socket's queue.
        print(json.dumps(ready) if json_output else f"{text} (Ctrl-C stops)", flush=True)
        await runner.serve(server, sock)
        await backend.close()
    finally:
        sock.close()
