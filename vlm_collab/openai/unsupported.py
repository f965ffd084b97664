"""Parameters that are not supported: which are refused, and which are ignored and listed.

An unknown field has no effect and is ignored. A response header lists it (`IGNORED_HEADER`), so
that nothing is ignored silently. A field is refused if an answer that ignores it would mislead the
client: another format, another number of answers, other words, or an answer about something that
the model did not see. `REFUSED` names these fields, with the values that have no effect and are
accepted. A field that holds a picture is refused whatever its name.

Parameters that cut off unlikely tokens (`top_k`, `min_p`, …) are ignored. Without `temperature` the
likeliest token is taken, which they never cut off; with `temperature`, tokens are drawn from the
model's own distribution. Penalties and biases are refused, since they change which token is the
likeliest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from vlm_collab.openai.errors import ApiError, refuse
from vlm_collab.openai.hidden_pictures import refuse_pictures_in

IGNORED_HEADER = "x-vlm-collab-ignored"
"""Response header with the ignored fields, as paths without indices, separated by commas."""

UNSUPPORTED = "unsupported_parameter"


class _Rule(NamedTuple):
    """Why a field is refused, and the values with which it is accepted."""

    why: str
    neutral: Collection[object] = ()


_ONE_ANSWER = "only one answer per question is supported"
_NO_PENALTIES = "penalties are not supported"
_FIXED_CHOICE = "the choice of tokens cannot be changed in this way"
_PLAIN_TEXT = "answers are plain text"
_NO_PREFIX = "an answer cannot continue a given text"
_FIXED_END = "an answer ends only where the model or a stop text ends it"
_FIXED_PROMPT = "the prompt template belongs to the model and cannot be changed"
_IN_MESSAGES = "put all texts for the model into the messages (chat) or the input (responses)"
NO_TOOL_CALLS = "the model does not call this tool; use auto or none"
"""Why a required tool call is refused."""
_NO_FILES = "send pictures as parts of a user message; other files are not supported"

REFUSED: Mapping[str, _Rule] = {
    # Number of answers.
    "n": _Rule(_ONE_ANSWER, [1]),
    "best_of": _Rule(_ONE_ANSWER, [1]),
    "top_logprobs": _Rule("only the chosen token's log probability is returned", [0]),
    # Choice of tokens.
    "presence_penalty": _Rule(_NO_PENALTIES, [0]),
    "frequency_penalty": _Rule(_NO_PENALTIES, [0]),
    "repetition_penalty": _Rule(_NO_PENALTIES, [1]),
    "repeat_penalty": _Rule(_NO_PENALTIES, [1]),
    "logit_bias": _Rule("token biases are not supported", [{}, []]),
    "bad_words": _Rule(_FIXED_CHOICE, [[]]),
    "allowed_token_ids": _Rule(_FIXED_CHOICE, [[]]),
    "logits_processors": _Rule(_FIXED_CHOICE, [[]]),
    "no_repeat_ngram_size": _Rule(_FIXED_CHOICE, [0]),
    "dry_multiplier": _Rule(_NO_PENALTIES, [0]),
    "use_beam_search": _Rule(_FIXED_CHOICE, [False]),
    "num_beams": _Rule(_FIXED_CHOICE, [1]),
    # Format of the answer.
    "response_format": _Rule(_PLAIN_TEXT, [{"type": "text"}]),
    "format": _Rule(_PLAIN_TEXT, [{"type": "text"}, ""]),
    "json_schema": _Rule(_PLAIN_TEXT, [{}]),
    "grammar": _Rule(_PLAIN_TEXT, [""]),
    "structured_outputs": _Rule(_PLAIN_TEXT, [{}]),
    "guided_json": _Rule(_PLAIN_TEXT),
    "guided_regex": _Rule(_PLAIN_TEXT),
    "guided_choice": _Rule(_PLAIN_TEXT),
    "guided_grammar": _Rule(_PLAIN_TEXT),
    "regex": _Rule(_PLAIN_TEXT, [""]),
    "ebnf": _Rule(_PLAIN_TEXT, [""]),
    "modalities": _Rule(_PLAIN_TEXT, [["text"]]),
    # Where the answer begins and ends.
    "continue_final_message": _Rule(_NO_PREFIX, [False]),
    "suffix": _Rule("text after the answer is not supported", [""]),
    "echo": _Rule("an answer does not repeat the prompt", [False]),
    "ignore_eos": _Rule(_FIXED_END, [False]),
    "min_tokens": _Rule(_FIXED_END, [0]),
    "stop_token_ids": _Rule(_FIXED_END, [[]]),
    # The prompt, searches, and background work.
    "messages": _Rule(_IN_MESSAGES),
    "input": _Rule(_IN_MESSAGES),
    "instructions": _Rule(_IN_MESSAGES),
    "system": _Rule(_IN_MESSAGES),
    "prompt": _Rule(_IN_MESSAGES),
    "chat_template": _Rule(_FIXED_PROMPT),
    "template": _Rule(_FIXED_PROMPT, [""]),
    "truncate_prompt_tokens": _Rule("prompts are not truncated"),
    "conversation": _Rule("not supported; use previous_response_id"),
    "web_search_options": _Rule("web search is not supported"),
    "plugins": _Rule("plugins are not supported", [[]]),
    "background": _Rule("background responses are not supported", [False]),
    # The older form of `tool_choice`; only `parse_chat` reads it.
    "function_call": _Rule(NO_TOOL_CALLS, ["auto", "none"]),
}
"""Fields of a request that are refused: an answer that ignores them would mislead the client."""

_REFUSED_ANYWHERE: Mapping[str, _Rule] = {
    "audio": _Rule("audio is not supported"),
    "prefix": _Rule(_NO_PREFIX, [False, ""]),
    "attachment": _Rule(_NO_FILES),
    "attachments": _Rule(_NO_FILES, [[]]),
    "document": _Rule(_NO_FILES),
    "documents": _Rule(_NO_FILES, [[]]),
    "file": _Rule(_NO_FILES),
    "files": _Rule(_NO_FILES, [[]]),
    "file_id": _Rule(_NO_FILES),
    "file_ids": _Rule(_NO_FILES, [[]]),
    "image": _Rule(_NO_FILES),
    "images": _Rule(_NO_FILES, [[]]),
    "video": _Rule(_NO_FILES),
    "videos": _Rule(_NO_FILES, [[]]),
}
"""Fields that are refused in messages and their parts, too."""

_NEUTRAL: Mapping[str, Collection[object]] = {
    "store": [False],
    "functions": [[]],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "reasoning": [{}, {"effort": "none"}, {"effort": None, "summary": None}],
    "verbosity": ["medium"],
    "truncation": ["disabled"],
}
"""Values that change nothing, so they are not listed as ignored."""

_MOST_NAMES = 32
_MOST_NAME_CHARS = 64
_INDEX = re.compile(r"\[[0-9]+\]")
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class Ignored:
    """The fields of a request that have no effect, in order of appearance."""

    def __init__(self) -> None:
        self._paths: dict[str, None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Paths without indices, each once: at most 32, of at most 64 characters each."""
        return tuple(self._paths)

    def refuse_or_list(self, where: str, name: str, value: object) -> None:
        """Refuse a field that no parser reads, or list it as ignored.

        Args:
            where: path of the object with the field; empty for the request itself.
            name: its name.
            value: its value, not null.

        Raises:
            ApiError: the field is refused, or holds a picture.
        """
        path = f"{where}.{name}" if where else name
        rule = _REFUSED_ANYWHERE.get(name) or (None if where else REFUSED.get(name))
        if rule is not None:
            if not is_any_of(value, rule.neutral):
                raise refused(path, rule.why)
        elif not is_any_of(value, _NEUTRAL.get(name, ())):
            if not isinstance(value, int | float):
                refuse_pictures_in(value, path)
            self.add(path)

    def add(self, path: str) -> None:
        """List a field as ignored."""
        if len(self._paths) < _MOST_NAMES:
            # Names come from the client, and headers are short ASCII.
            shown = _UNPRINTABLE.sub("?", _INDEX.sub("[]", path)[:_MOST_NAME_CHARS])
            self._paths.setdefault(shown)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The response header that lists ignored fields; no header if there are none."""
    listed = ", ".join(names)
    return {IGNORED_HEADER: listed} if listed else {}


def refused(param: str, why: str) -> ApiError:
    """The error for a parameter that is not supported."""
    return refuse(param, f"{param}: {why}", UNSUPPORTED)


def is_any_of(value: object, accepted: Iterable[object]) -> bool:
    """Whether a value equals one of some JSON values; unlike in Python, true does not equal 1."""
    return any(
        value == one and isinstance(value, bool) is isinstance(one, bool) for one in accepted
    )
