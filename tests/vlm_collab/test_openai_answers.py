"""Answers in OpenAI's format: objects, streams, errors, and the streaming of growing texts."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from vlm_collab.errors import (
    AuthenticationError,
    CollabError,
    ConfigError,
    DeadlineError,
    ErrorCode,
    ImageError,
    ImageTooLargeError,
    LinkError,
    LocalProtocolError,
    PrivacyError,
    QuestionError,
    server_error,
)
from vlm_collab.openai import (
    ApiError,
    ChatStream,
    RegionReport,
    Report,
    ResponseBuilder,
    Result,
    TextStream,
    WireLimits,
    api_error,
    check_model,
    completion,
    parse_responses,
)
from vlm_collab.protocol.messages import Finish, Stage, Token

FIRST, SECOND = Stage.FIRST, Stage.SECOND
REPORT = Report(
    model="served",
    stage="second",
    refined=True,
    region=RegionReport(0, (1, 2, 3, 4)),
    bytes_up=500,
    original_bytes=9000,
)
RESULT = Result(text="a sign", report=REPORT, prompt_tokens=30, completion_tokens=4)
TRUNCATED = Result(
    text="a sign",
    report=REPORT,
    finish=Finish.LENGTH,
    tokens=(Token("a", 1_000_000), Token(" sign", 500_000), Token("", 1)),
)


def events(sent: bytes) -> list[Any]:
    """The parsed events of a stream."""
    lines = [line for line in sent.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) if line != "data: [DONE]" else None for line in lines]


def builder(**more: Any) -> ResponseBuilder:
    request = parse_responses({"input": "x", **more}, WireLimits())
    return ResponseBuilder(request, id="resp_1", created=5, model="m")


def encoded(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


def strictly(kind: Any, value: Any) -> Any:
    """Parse with the SDK's own types; missing and mistyped fields fail."""
    return TypeAdapter(kind).validate_python(value, strict=False)


def test_a_completion() -> None:
    reply = strictly(ChatCompletion, encoded(completion(RESULT, id="c", created=5, model="m")))
    assert reply.choices[0].message.content == "a sign"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert reply.usage.total_tokens == 34
    assert reply.vlm_collab["region"] == {"picture": 0, "box": [1, 2, 3, 4]}
    assert reply.vlm_collab["bytes_up"] == 500


def test_logprobs_are_in_nats_and_leave_out_the_end() -> None:
    reply = strictly(ChatCompletion, encoded(completion(TRUNCATED, id="c", created=5, model="m")))
    assert reply.choices[0].finish_reason == "length"
    logprobs = reply.choices[0].logprobs.content
    assert [each.token for each in logprobs] == ["a", " sign"]
    assert logprobs[0].logprob == pytest.approx(-math.log(2))
    assert bytes(logprobs[1].bytes) == b" sign"


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_completion(include_usage: bool) -> None:
    stream = ChatStream(id="c", created=5, model="m", include_usage=include_usage)
    sent = stream.start() + stream.delta("a ") + stream.delta("") + stream.finish("sign", RESULT)
    *sent_events, done = events(sent)
    assert done is None
    chunks = [strictly(ChatCompletionChunk, each) for each in sent_events]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == "a sign"
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].vlm_collab["refined"]
    assert not any("vlm_collab" in each for each in sent_events[:-1])
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == 34
        assert all(each["usage"] is None for each in sent_events[:-1])
    else:
        assert not any("usage" in each for each in sent_events)


def test_a_failed_stream_ends_with_the_error() -> None:
    stream = ChatStream(id="c", created=5, model="m", include_usage=False)
    error, done = events(stream.error(ApiError(502, "lost", "server_error")))
    assert error["error"]["message"] == "lost"
    assert done is None


def test_a_response() -> None:
    reply = strictly(Response, encoded(builder(instructions="be short").whole(RESULT)))
    assert reply.output_text == "a sign"
    assert reply.status == "completed"
    assert reply.instructions == "be short"
    assert reply.usage.total_tokens == 34
    assert reply.vlm_collab["original_bytes"] == 9000


def test_a_truncated_response_is_incomplete() -> None:
    reply = strictly(Response, encoded(builder().whole(TRUNCATED)))
    assert reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert [each.token for each in reply.output[0].content[0].logprobs] == ["a", " sign"]


def test_a_streamed_response() -> None:
    form = builder(stream=True)
    sent_events = events(form.start() + form.delta("a ") + form.finish("sign", RESULT))
    typed = [strictly(ResponseStreamEvent, each) for each in sent_events]
    assert [each.type for each in typed] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [each.sequence_number for each in typed] == list(range(10))
    assert typed[-1].response.output_text == "a sign"
    assert typed[-1].response.vlm_collab["bytes_up"] == 500


def test_an_empty_streamed_response_still_has_its_parts() -> None:
    form = builder(stream=True)
    empty = Result(text="", report=REPORT)
    kinds = [each["type"] for each in events(form.start() + form.finish("", empty))]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-1] == "response.completed"


def test_a_call_of_the_region_tool() -> None:
    tool = [{"type": "function", "name": "request_region"}]
    whole = builder(tools=tool).whole_call("call_1", {"left": 0.5}, RESULT)
    reply = strictly(Response, encoded(whole))
    call = reply.output[0]
    assert (call.type, call.name, call.call_id) == ("function_call", "request_region", "call_1")
    assert json.loads(call.arguments) == {"left": 0.5}
    form = builder(tools=tool, stream=True)
    sent_events = events(form.start() + form.finish_call("call_1", {"left": 0.5}, RESULT))
    typed = [strictly(ResponseStreamEvent, each) for each in sent_events]
    assert typed[-1].type == "response.completed"
    assert typed[-1].response.output[0].call_id == "call_1"
    assert typed[-3].type == "response.function_call_arguments.done"


def test_a_failed_streamed_response_ends_with_the_error() -> None:
    form = builder(stream=True)
    sent_events = events(form.start() + form.error(ApiError(502, "lost", "server_error")))
    assert strictly(ResponseStreamEvent, sent_events[-1]).response.error.message == "lost"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ImageError("x"), 400, "invalid_image"),
        (ImageTooLargeError("x"), 413, "image_too_large"),
        (QuestionError("x"), 400, "invalid_question"),
        (ConfigError("x"), 400, "invalid_option"),
        (PrivacyError("x"), 403, "privacy_policy"),
        (DeadlineError("x"), 504, "deadline"),
        (AuthenticationError("x"), 502, "upstream_authentication"),
        (LinkError("x"), 503, "no_server"),
        (LocalProtocolError("x", ErrorCode.TOO_LARGE), 413, "too_large"),
        (LocalProtocolError("x"), 502, "upstream_protocol"),
        (CollabError("x"), 500, "internal"),
        *(
            (server_error(code, "x", None), status, None)
            for code, status in {
                ErrorCode.BAD_IMAGE: 400,
                ErrorCode.TOO_LARGE: 413,
                ErrorCode.BAD_QUESTION: 400,
                ErrorCode.VIEW_GONE: 502,
                ErrorCode.BUSY: 429,
                ErrorCode.SHUTTING_DOWN: 503,
                ErrorCode.DEADLINE: 504,
                ErrorCode.BAD_OPTION: 400,
                ErrorCode.INTERNAL: 500,
            }.items()
        ),
    ],
)
def test_errors_are_translated_to_status_and_code(
    error: CollabError, status: int, code: str | None
) -> None:
    translated = api_error(error, param="here")
    assert translated.status == status
    assert code is None or translated.code == code
    assert "x" in translated.message
    assert (translated.param is not None) <= (400 <= status < 500)
    assert ("Retry-After" in translated.headers()) == (status in (429, 503))


def test_retry_after_is_at_least_one_second() -> None:
    busy = api_error(server_error(ErrorCode.BUSY, "full", 0.2))
    assert busy.headers() == {"Retry-After": "1"}


def test_models_that_are_not_served_are_refused() -> None:
    check_model(None, ["a"])
    check_model("", ["a"])
    check_model("b", ["a", "b"])
    with pytest.raises(ApiError, match="available: a, b") as caught:
        check_model("c", ["a", "b"])
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_text_of_the_first_pass_is_sent_only_at_the_end() -> None:
    flow = TextStream()
    assert [flow.feed(FIRST, text) for text in ("a", "a bird", "a bird!")] == ["", "", ""]
    assert flow.finish("a bird!") == "a bird!"
    assert not flow.restarted


def test_text_of_the_second_pass_is_streamed() -> None:
    flow = TextStream()
    flow.feed(FIRST, "a bird")
    sent = [flow.feed(SECOND, text) for text in ("the number is", "the number is 47")]
    assert sent == ["the numbe", "r i"]
    assert flow.finish("the number is 47") == "s 47"
    assert not flow.restarted


def test_a_final_text_that_does_not_continue_the_sent_one_is_sent_whole() -> None:
    flow = TextStream()
    assert flow.feed(SECOND, "the number is 47") == "the number i"
    assert flow.finish("a bird") == "\n\na bird"
    assert flow.restarted


def test_a_repeated_pass_continues_the_sent_text() -> None:
    flow = TextStream()
    sent = flow.feed(SECOND, "the number is")
    assert flow.feed(FIRST, "a") == flow.feed(SECOND, "the") == ""
    assert sent + flow.finish("the number is 47") == "the number is 47"
    assert not flow.restarted


TEXTS = st.text(alphabet="ab .\n\N{REPLACEMENT CHARACTER}", max_size=24)


@given(TEXTS, st.lists(st.integers(0, 24), max_size=8))
def test_pieces_make_up_the_text(text: str, cuts: list[int]) -> None:
    flow = TextStream()
    sent = "".join(flow.feed(SECOND, text[:cut]) for cut in cuts)
    assert sent + flow.finish(text) == text
    assert not flow.restarted


@given(TEXTS, st.text(alphabet="ab .\n", min_size=1, max_size=3), st.integers(1, 5))
def test_no_part_of_a_stop_text_is_sent(text: str, stop: str, step: int) -> None:
    """As the engine reports it: the text grows into the stop text, then ends before it."""
    whole = text + stop
    flow = TextStream((stop,))
    sent = "".join(flow.feed(SECOND, whole[:cut]) for cut in range(0, len(whole) + 1, step))
    final = whole.partition(stop)[0].rstrip()
    assert sent + flow.finish(final) == final
    assert not flow.restarted
