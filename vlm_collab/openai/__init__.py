"""OpenAI's Chat Completions and Responses APIs as bytes in and bytes out, for gateway and server.

`parse_chat` and `parse_responses` make questions of requests; `completion`, `ChatStream` and
`ResponseBuilder` put answers into OpenAI's form; `TextStream` decides what of a growing answer can
be sent. What can't be honoured is refused with the parameter's name (`ApiError`), or ignored and
listed: `vlm_collab.openai.unsupported` has the rule.
No sockets, clocks or models here.
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
from vlm_collab.openai.chat_reply import ChatStream, completion, finish_reason
from vlm_collab.openai.chat_request import parse_chat
from vlm_collab.openai.conversation import Conversation, PictureSource, Query, Role, Url, WireLimits
from vlm_collab.openai.errors import ApiError, api_error, no_such_route, refuse
from vlm_collab.openai.fields import decode_body
from vlm_collab.openai.hidden_pictures import refuse_pictures_in
from vlm_collab.openai.parameters import without_tools
from vlm_collab.openai.responses_reply import ResponseBuilder
from vlm_collab.openai.responses_request import (
    REGION_TOOL,
    CallOutput,
    ResponsesRequest,
    call_id,
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
    "finish_reason",
    "ignored_header",
    "model_object",
    "models_list",
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
