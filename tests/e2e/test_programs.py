"""Requests of existing programs, to the service and to the gateway in front of it.

Requests of the Vercel AI SDK were recorded (`ai` 6.0.326 with `@ai-sdk/openai` 3.0.141). The others
are written after the programs' sources.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from edge_client.gateway import running
from server_plugin.backends.fake import DEFAULT_INFO, FakeBackend
from server_plugin.service.config import OpenAiLimits
from server_plugin.service.runner import running as serving
from tests.e2e.gateways import MODEL, Deployment, data_url, deployed, gateway
from tests.support.patience import PATIENCE_S
from tests.support.pictures import photo as picture
from tests.support.pictures import saved
from tests.support.wire import SURE, http, service
from vlm_collab.openai import WireLimits
from vlm_collab.protocol.server_session import ServerLimits

PHOTO = saved(picture(900, 700), "JPEG", quality=90)
IGNORED = "x-vlm-collab-ignored"
FUNCTION: dict[str, Any] = {
    "name": "get_live_context",
    "description": "What a camera sees now",
    "parameters": {
        "type": "object",
        "properties": {"camera": {"type": "string", "description": "Name of the camera"}},
        "required": ["camera"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {
    "id": "call_8f1",
    "type": "function",
    "function": {"name": "get_live_context", "arguments": '{"camera": "door"}'},
}
IMAGE_PART = {"type": "image_url", "image_url": {"url": data_url(PHOTO), "detail": "low"}}


@asynccontextmanager
async def both(**options: Any) -> AsyncIterator[tuple[Deployment, list[httpx.AsyncClient]]]:
    """The service and the gateway, for plain HTTP below `/v1`."""
    async with deployed(**options) as deployment:
        direct = http(deployment.proxy.url) + "/v1"
        async with httpx.AsyncClient(
            base_url=direct, trust_env=False, timeout=PATIENCE_S
        ) as server:
            yield deployment, [server, deployment.http]


def streamed_text(stream: str) -> str:
    """The text of a streamed chat completion."""
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


OPEN_WEBUI = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [{"role": "user", "content": [{"type": "text", "text": SURE}, IMAGE_PART]}],
    "tools": TOOLS,
}
FRIGATE_CHAT = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [
        {"role": "system", "content": "You look after cameras."},
        {"role": "user", "content": "who is at the door?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_8f1", "content": '{"camera": "door"}'},
        {"role": "user", "content": [{"type": "text", "text": SURE}, IMAGE_PART]},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
}
AUTOGEN = {
    "stream": True,
    "messages": [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "name": "user_proxy",
            "content": [{"type": "text", "text": SURE}, IMAGE_PART],
        },
    ],
}
LLAMA_CPP = {
    "stream": True,
    "messages": [{"role": "user", "content": [{"type": "text", "text": SURE}, IMAGE_PART]}],
    "cache_prompt": True,
    "top_k": 40,
    "min_p": 0.05,
    "chat_template_kwargs": {"enable_thinking": False},
    "frequency_penalty": 0,
    "repeat_penalty": 1.0,
}


@pytest.mark.parametrize(
    ("body", "question", "listed"),
    [
        (OPEN_WEBUI, SURE, "tools"),
        (
            FRIGATE_CHAT,
            f'You look after cameras.\nwho is at the door?\n{{"camera": "door"}}\n{SURE}',
            "tools",
        ),
        (AUTOGEN, f"Be short.\n{SURE}", "messages[].name"),
        (LLAMA_CPP, SURE, "cache_prompt, top_k, min_p, chat_template_kwargs"),
        ({**OPEN_WEBUI, "tools": []}, SURE, None),
    ],
)
async def test_a_picture_in_a_programs_own_form_is_answered(
    body: dict[str, Any], question: str, listed: str | None
) -> None:
    async with both() as (_, clients):
        for client in clients:
            streamed = await client.post("/chat/completions", json={"model": MODEL, **body})
            assert streamed.status_code == 200, streamed.text
            assert streamed_text(streamed.text).split(" ", 2)[2] == question
            assert streamed.headers.get(IGNORED) == listed
            whole = {name: one for name, one in body.items() if not name.startswith("stream")}
            answer = await client.post("/chat/completions", json={"model": MODEL, **whole})
            (choice,) = answer.json()["choices"]
            assert choice["message"]["content"].split(" ", 2)[2] == question
            assert answer.headers.get(IGNORED) == listed


async def test_a_required_tool_call_is_refused() -> None:
    named = {"type": "function", "function": {"name": "get_live_context"}}
    async with both() as (_, clients):
        for client in clients:
            for choice in ("required", named):
                body = {"model": MODEL, **OPEN_WEBUI, "tool_choice": choice}
                answer = await client.post("/chat/completions", json=body)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, "tool_choice")
                assert "\n" not in error["message"]


@pytest.mark.parametrize("images", [[], [IMAGE_PART]])
async def test_the_older_field_for_a_required_call_is_refused(
    images: list[Any],
) -> None:
    """A gateway forwards requests without pictures, but not this field."""
    content = [{"type": "text", "text": SURE}, *images]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "functions": [FUNCTION],
    }
    async with both() as (_, clients):
        for client in clients:
            demanded = {**body, "function_call": {"name": FUNCTION["name"]}}
            answer = await client.post("/chat/completions", json=demanded)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "function_call")
            for choice in ("auto", "none"):
                offered = {**body, "function_call": choice}
                answer = await client.post("/chat/completions", json=offered)
                assert answer.status_code == 200
                assert answer.headers[IGNORED] == "functions"


async def test_ignored_fields_are_listed_for_requests_without_pictures() -> None:
    """Both sides list ignored fields; fields that must not leave the device are not forwarded."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": SURE}],
        "tools": TOOLS,
        "cache_prompt": True,
    }
    # The gateway does not forward `cache_prompt`, so the server does not list it again.
    lists = ("tools, cache_prompt", "cache_prompt, tools")
    async with both() as (_, clients):
        for client, listed in zip(clients, lists, strict=True):
            for stream in (False, True):
                answer = await client.post("/chat/completions", json={**body, "stream": stream})
                assert answer.status_code == 200, answer.text
                assert answer.headers[IGNORED] == listed


def ai_sdk(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [
        {"type": "input_text", "text": SURE},
        {"type": "input_image", "image_url": data_url(PHOTO)},
    ]
    begun = [{"role": "system", "content": "be short"}, {"role": "user", "content": content}]
    return {"model": MODEL, "input": [*begun, *items], **more}


def ai_sdk_asks(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": text}]}


async def test_the_ai_sdk_can_refer_to_an_earlier_answer() -> None:
    async with both() as (_, clients):
        for client in clients:
            first = (await client.post("/responses", json=ai_sdk())).json()
            (message,) = first["output"]
            text = message["content"][0]["text"]
            referred = {"type": "item_reference", "id": message["id"]}
            body = ai_sdk(referred, ai_sdk_asks("and now?"))
            second = (await client.post("/responses", json=body)).json()
            answer = second["output"][0]["content"][0]["text"]
            assert answer.split(" ", 2)[2] == f"be short\n{SURE} {text} and now?"
            # The client gets the same if it sends the answer itself.
            whole = {"role": "assistant", "content": [{"type": "output_text", "text": text}]}
            body = ai_sdk(whole, ai_sdk_asks("and now?"))
            again = (await client.post("/responses", json=body)).json()
            assert again["output"][0]["content"][0]["text"] == answer
            streamed = await client.post(
                "/responses",
                json=ai_sdk(
                    referred,
                    ai_sdk_asks("and now?"),
                    {"type": "item_reference", "id": second["output"][0]["id"]},
                    ai_sdk_asks("so?"),
                    stream=True,
                ),
            )
            assert "response.output_text.done" in streamed.text


async def test_a_reference_to_an_unknown_answer_is_not_found() -> None:
    async with both() as (_, clients):
        for client in clients:
            first = (await client.post("/responses", json=ai_sdk())).json()
            unkept = (await client.post("/responses", json=ai_sdk(store=False))).json()
            deleted = await client.delete(f"/responses/{first['id']}")
            assert deleted.json()["deleted"]
            for id in (first["output"][0]["id"], unkept["output"][0]["id"], "msg_1", "rs_1"):
                body = ai_sdk({"type": "item_reference", "id": id}, ai_sdk_asks("and now?"))
                answer = await client.post("/responses", json=body)
                error = answer.json()["error"]
                assert answer.status_code == 404
                assert (error["param"], error["code"]) == ("input[2].id", "item_not_found")
                assert error["type"] == "invalid_request_error"
                assert id in error["message"]


async def test_a_reference_works_only_with_the_key_of_its_answer() -> None:
    """At the service an answer belongs to a key; at the gateway it belongs to a camera."""
    async with both(config={"token": "one", "more_tokens": ("two",)}, token="one") as (_, clients):
        server, _ = clients
        keys = [{"authorization": f"Bearer {key}"} for key in ("one", "two")]
        reply = await server.post("/responses", json=ai_sdk(), headers=keys[0])
        referred = {"type": "item_reference", "id": reply.json()["output"][0]["id"]}
        body = ai_sdk(referred, ai_sdk_asks("and now?"))
        statuses = [
            (await server.post("/responses", json=body, headers=key)).status_code for key in keys
        ]
        assert statuses == [200, 404]


async def test_an_answer_outlives_its_picture_and_a_reference_renews_it():
    limits = OpenAiLimits(keep_s=0.05, keep_answers_s=600, max_kept=2)
    gateway_limits = {"max_responses": 1, "max_answers": 2}
    async with both(config={"openai": limits}, limits=gateway_limits) as (deployment, clients):
        for client in clients:

            async def answered(client: httpx.AsyncClient = client) -> dict[str, Any]:
                response = (await client.post("/responses", json=ai_sdk())).json()
                return {"type": "item_reference", "id": response["output"][0]["id"]}

            async def status(referred: dict[str, Any], client: httpx.AsyncClient = client) -> int:
                body = ai_sdk(referred, ai_sdk_asks("and now?"), store=False)
                return (await client.post("/responses", json=body)).status_code

            first = await answered()
            async with asyncio.timeout(PATIENCE_S):
                while deployment.service.openai.responses.count:
                    await asyncio.sleep(0.01)
            second = await answered()
            assert await status(first) == 200  # so it is the most recently used now
            third = await answered()
            assert [await status(each) for each in (first, second, third)] == [200, 404, 200]
        assert deployment.service.openai.answers.count == 2


async def test_optional_tools_of_the_ai_sdk_are_ignored() -> None:
    tools = [
        {"type": "function", "name": "weather", "description": "w", "parameters": {}},
        {"type": "web_search"},
    ]
    more = {"tools": tools, "tool_choice": "auto", "include": ["web_search_call.action.sources"]}
    async with both() as (_, clients):
        for client in clients:
            for stream in (False, True):
                body = ai_sdk(**more, stream=stream)
                answer = await client.post("/responses", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.headers[IGNORED] == "tools"


async def test_max_question_bytes_counts_all_texts() -> None:
    """The limit counts the bytes of all texts, with a picture and without one."""
    for side in range(2):  # the service, then the gateway
        service_limits = {"connection": ServerLimits(max_question_bytes=100)} if side == 0 else None
        limits = {"max_question_bytes": 100} if side == 1 else None
        async with both(service_limits=service_limits, limits=limits) as (_, clients):
            for text, fits in (("ä" * 50, True), ("ä" * 51, False)):
                for content in (text, [{"type": "text", "text": text}, IMAGE_PART]):
                    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
                    answer = await clients[side].post("/chat/completions", json=body)
                    assert answer.status_code == (200 if fits else 400), answer.text
                    assert fits or "102 bytes" in answer.json()["error"]["message"]


# ---- models and unknown routes ---------------------------------------------------------------


async def test_models_list_their_context_length_and_modalities() -> None:
    backend = FakeBackend(info=replace(DEFAULT_INFO, context_tokens=2048))
    async with both(backend=backend) as (_, clients):
        for client in clients:
            (listed,) = (await client.get("/models")).json()["data"]
            assert listed["id"] == MODEL
            assert listed["max_model_len"] == listed["context_length"] == 2048
            assert listed["architecture"]["input_modalities"] == ["text", "image"]
            assert (await client.get(f"/models/{MODEL}")).json() == listed
            # A client that joins its base URL and an empty name gets the list.
            assert (await client.get("/models/")).json()["data"] == [listed]


async def test_without_a_known_context_length_none_is_listed() -> None:
    """Like an older service, which speaks the protocol but has no OpenAI endpoint."""
    old_service = service()
    old_service.openai.routes = list  # type: ignore[method-assign]
    async with (
        serving(old_service) as url,
        running(gateway(url)) as base,
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=PATIENCE_S) as client,
    ):
        (listed,) = (await client.get("/models")).json()["data"]
        assert listed["id"] == MODEL
        assert "max_model_len" not in listed


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions/", "/v1/chat/completions"),
        ("/completions", "/v1/chat/completions"),
        ("/responses", "/v1/responses"),
        ("/models", "/v1/models"),
        ("/cameras/door/chat/completions", "/v1/chat/completions"),
    ],
)
async def test_the_right_path_is_suggested_for_a_similar_one(path: str, meant: str) -> None:
    async with both() as (_, clients):
        for client, camera in zip(clients, ("", "/cameras/door"), strict=True):
            if path.startswith(camera):  # only the gateway has cameras
                meant = camera + meant
            root = str(client.base_url).removesuffix("/v1/").rstrip("/")
            answer = await client.post(root + path, json={})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "unknown_url")
            assert error["message"].count(f"did you mean {meant}?") == 1
            assert path.rstrip("/") in error["message"]


async def test_unknown_routes_are_refused_in_openais_format() -> None:
    async with both() as (_, clients):
        for client in clients:
            root = str(client.base_url).removesuffix("/v1/").rstrip("/")
            for method, path, status in (
                ("GET", "/api/tags", 404),
                ("GET", "/a%0Ab", 404),
                ("GET", "/v1/embeddings", 404),
                ("DELETE", "/healthz", 405),
                ("GET", "/v1/chat/completions", 405),
                ("POST", "/v1/models", 405),
                ("PUT", "/v1/responses", 405),
            ):
                answer = await client.request(method, root + path)
                error = answer.json()["error"]
                assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
                assert "\n" not in error["message"]
                if status == 405:  # the path that was used is not suggested
                    assert answer.headers["allow"]
                    assert "did you mean" not in error["message"]
            assert "/v1" in (await client.get(root + "/api/tags")).json()["error"]["message"]


# ---- compressed requests ---------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("gzip", lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:])),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
    ],
)
async def test_a_compressed_request_is_read(
    encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    body = compress(json.dumps({"model": MODEL, **AUTOGEN}).encode())
    headers = {"content-type": "application/json", "content-encoding": encoding}
    async with both() as (_, clients):
        for client in clients:
            answer = await client.post("/chat/completions", content=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert streamed_text(answer.text).endswith(SURE)


SMALL = 1 << 20
BODY = json.dumps({"model": MODEL, **AUTOGEN}).encode()


@pytest.mark.parametrize(
    ("encoding", "body", "status", "reason"),
    [
        ("br", b"x", 415, "br"),
        ("gzip, br", b"x", 415, "gzip, br"),
        ("zstd", b"x", 415, "zstd"),
        ("gzip", BODY, 400, "not valid gzip"),
        ("gzip", gzip.compress(BODY)[:-9], 400, "cut short"),
        ("gzip", b"", 400, "cut short"),
        ("deflate", zlib.compress(BODY) + b"more", 400, "after its end"),
        ("deflate", b"\xff\xff\xff", 400, "not valid deflate"),
        ("gzip", gzip.compress(b" " * SMALL + BODY), 413, "bytes|MiB"),
        ("gzip", gzip.compress(b" " * (64 << 20)), 413, "bytes|MiB"),
    ],
)
async def test_a_request_that_cannot_be_decompressed_is_refused(
    encoding: str, body: bytes, status: int, reason: str
) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    limits = {"wire": WireLimits(max_body_bytes=SMALL)}
    config = {"openai": OpenAiLimits(max_body_bytes=SMALL)}
    async with both(limits=limits, config=config) as (_, clients):
        for client in clients:
            answer = await client.post("/chat/completions", content=body, headers=headers)
            message = answer.json()["error"]["message"]
            assert answer.status_code == status, message
            assert any(word in message for word in reason.split("|"))
            assert "\n" not in message
