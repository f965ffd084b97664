"""OpenAI's Chat Completions and Responses APIs as bytes in and bytes out, for gateway and service.

- Requests: `parse_chat` (`chat_request`) and `parse_responses` (`responses_request`) read them;
  `conversation` has the result, a `Query`. `fields` reads JSON objects, `parameters` reads what
  both APIs share, `bounds` limits the size, `unsupported` says what is refused or ignored.
- Requests about text alone: `text_only` has their schema; `hidden_pictures` finds pictures
  hidden in texts.
- Answers: `completion` and `ChatStream` (`chat_reply`), `ResponseBuilder` (`responses_reply`);
  `answer` has what both share. `TextStream` decides which part of a growing answer can be sent.
- Errors: `ApiError` and the translation of this project's errors to it (`errors`).

There are no sockets, clocks or models here.
"""

from vlm_collab.openai.answer import (
    DONE,
    RegionReport,
    Report,
    Result,
    check_model,
    model_object,
    models_list,
    sse,
    stage_name,
)
from vlm_collab.openai.bounds import check_text_length
from vlm_collab.openai.chat_reply import ChatStream, completion, finish_reason, new_completion_id
from vlm_collab.openai.chat_request import parse_chat
from vlm_collab.openai.conversation import Conversation, PictureSource, Query, Role, Url, WireLimits
from vlm_collab.openai.errors import ApiError, api_error, no_such_route, refuse
from vlm_collab.openai.fields import decode_body
from vlm_collab.openai.hidden_pictures import refuse_pictures_in
from vlm_collab.openai.parameters import without_tools
from vlm_collab.openai.responses_reply import ResponseBuilder, deleted_response
from vlm_collab.openai.responses_request import (
    REGION_TOOL,
    CallOutput,
    ResponsesRequest,
    call_id,
    new_response_id,
    parse_responses,
)
from vlm_collab.openai.text_only import chat_is_text, texts_of, without_ignored
from vlm_collab.openai.text_stream import TextStream
from vlm_collab.openai.unsupported import IGNORED_HEADER, ignored_header

__all__ = [
    "DONE",
    "IGNORED_HEADER",
    "REGION_TOOL",
    "ApiError",
    "CallOutput",
    "ChatStream",
    "Conversation",
    "PictureSource",
    "Query",
    "RegionReport",
    "Report",
    "ResponseBuilder",
    "ResponsesRequest",
    "Result",
    "Role",
    "TextStream",
    "Url",
    "WireLimits",
    "api_error",
    "call_id",
    "chat_is_text",
    "check_model",
    "check_text_length",
    "completion",
    "decode_body",
    "deleted_response",
    "finish_reason",
    "ignored_header",
    "model_object",
    "models_list",
    "new_completion_id",
    "new_response_id",
    "no_such_route",
    "parse_chat",
    "parse_responses",
    "refuse",
    "refuse_pictures_in",
    "sse",
    "stage_name",
    "texts_of",
    "without_ignored",
    "without_tools",
]
