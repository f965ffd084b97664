"""Parameters that are not supported: which are refused, and which are ignored and listed.

An unknown field has no effect and is ignored. A response header lists it (`IGNORED_HEADER`), so
that nothing is ignored silently. A field is refused if the answer without it would mislead the
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


_BIASED = "tokens are taken as the model has them"
_PLAIN = "answers are plain text"
_BEGUN = "an answer begins anew"
_ENDED = "answers end where the model or a stop text ends them"
_PROMPTED = "the prompt is the served model's own"
_TOLD = "what the model is told goes into the messages or the input"
CALLS_NONE = "the model calls no tools; leave the choice to it"
"""Why a demanded tool call is refused."""
_SHOWN = "send pictures as parts of what the user says; other files cannot be read"

REFUSED: Mapping[str, _Rule] = {
    # Number of answers.
    "n": _Rule("one answer to a question", [1]),
    "best_of": _Rule("one answer to a question", [1]),
    "top_logprobs": _Rule("only the token that was chosen is told", [0]),
    # Choice of tokens.
    "presence_penalty": _Rule("penalties are not supported", [0]),
    "frequency_penalty": _Rule("penalties are not supported", [0]),
    "repetition_penalty": _Rule("penalties are not supported", [1]),
    "repeat_penalty": _Rule("penalties are not supported", [1]),
    "logit_bias": _Rule("biases are not supported", [{}, []]),
    "bad_words": _Rule(_BIASED, [[]]),
    "allowed_token_ids": _Rule(_BIASED, [[]]),
    "logits_processors": _Rule(_BIASED, [[]]),
    "no_repeat_ngram_size": _Rule(_BIASED, [0]),
    "dry_multiplier": _Rule("penalties are not supported", [0]),
    "use_beam_search": _Rule(_BIASED, [False]),
    "num_beams": _Rule(_BIASED, [1]),
    # Format of the answer.
    "response_format": _Rule(_PLAIN, [{"type": "text"}]),
    "format": _Rule(_PLAIN, [{"type": "text"}, ""]),
    "json_schema": _Rule(_PLAIN, [{}]),
    "grammar": _Rule(_PLAIN, [""]),
    "structured_outputs": _Rule(_PLAIN, [{}]),
    "guided_json": _Rule(_PLAIN),
    "guided_regex": _Rule(_PLAIN),
    "guided_choice": _Rule(_PLAIN),
    "guided_grammar": _Rule(_PLAIN),
    "regex": _Rule(_PLAIN, [""]),
    "ebnf": _Rule(_PLAIN, [""]),
    "modalities": _Rule("answers are text", [["text"]]),
    # Where the answer begins and ends.
    "continue_final_message": _Rule(_BEGUN, [False]),
    "suffix": _Rule(_BEGUN, [""]),
    "echo": _Rule(_BEGUN, [False]),
    "ignore_eos": _Rule(_ENDED, [False]),
    "min_tokens": _Rule(_ENDED, [0]),
    "stop_token_ids": _Rule(_ENDED, [[]]),
    # The prompt, searches, and background work.
    "messages": _Rule(_TOLD),
    "input": _Rule(_TOLD),
    "instructions": _Rule(_TOLD),
    "system": _Rule(_TOLD),
    "prompt": _Rule(_TOLD),
    "chat_template": _Rule(_PROMPTED),
    "template": _Rule(_PROMPTED, [""]),
    "truncate_prompt_tokens": _Rule(_PROMPTED),
    "conversation": _Rule("use previous_response_id"),
    "web_search_options": _Rule("nothing is searched"),
    "plugins": _Rule("there are none", [[]]),
    "background": _Rule("nothing runs in the background", [False]),
    # The older form of `tool_choice`; only `parse_chat` reads it.
    "function_call": _Rule(CALLS_NONE, ["auto", "none"]),
}
"""Fields of a request that are refused: the answer without them would mislead the client."""

_REFUSED_ANYWHERE: Mapping[str, _Rule] = {
    "audio": _Rule("neither heard nor spoken"),
    "prefix": _Rule(_BEGUN, [False, ""]),
    "attachment": _Rule(_SHOWN),
    "attachments": _Rule(_SHOWN, [[]]),
    "document": _Rule(_SHOWN),
    "documents": _Rule(_SHOWN, [[]]),
    "file": _Rule(_SHOWN),
    "files": _Rule(_SHOWN, [[]]),
    "file_id": _Rule(_SHOWN),
    "file_ids": _Rule(_SHOWN, [[]]),
    "image": _Rule(_SHOWN),
    "images": _Rule(_SHOWN, [[]]),
    "video": _Rule(_SHOWN),
    "videos": _Rule(_SHOWN, [[]]),
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
"""Values that ask for what happens anyway, so they are not listed as ignored."""

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

    def judge(self, where: str, name: str, value: object) -> None:
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
