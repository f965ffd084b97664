"""Parameters that both APIs have: how to answer, and what is refused or changes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

from vlm_collab.messages import Options, Retransmit
from vlm_collab.openai.errors import ApiError, refuse
from vlm_collab.openai.fields import UNSUPPORTED, Fields

_MAX_STOPS = 4
_MAX_STOP_CHARS = 64
_MOST_TOKENS = 65535

EXTENSION = "vlm_collab"
"""Our own field: in a request what only this project understands, in an answer what it cost."""


class Extension(NamedTuple):
    """The request's own field `vlm_collab`.

    Attributes:
        retransmit: leave a second look to the server's policy, force or forbid it.
        eta: threshold instead of the server's.
        sources: sizes (width, height) of the originals that the pictures are views of, in px.
    """

    retransmit: Retransmit = Retransmit.AUTO
    eta: float | None = None
    sources: tuple[tuple[int, int], ...] = ()


def read_extension(fields: Fields) -> Extension:
    """Read `vlm_collab`.

    Raises:
        ApiError: it is wrong.
    """
    value = fields.take(EXTENSION)
    if value is None:
        return Extension()
    mine = Fields(value, EXTENSION)
    name = mine.text("retransmit") or "auto"
    eta = mine.number("eta", 0.0, 1e6)
    sources = [_size(one, i) for i, one in enumerate(mine.items("sources"))]
    mine.end()
    known = {each.name.lower(): each for each in Retransmit}
    if name not in known:
        path = mine.path("retransmit")
        raise refuse(path, f"{path} must be one of {', '.join(known)}")
    return Extension(known[name], eta, tuple(sources))


def _size(value: Any, i: int) -> tuple[int, int]:
    whole = isinstance(value, list) and all(type(side) is int for side in value)
    if whole and len(value) == 2 and all(1 <= side <= 2**20 for side in value):
        return value[0], value[1]
    path = f"{EXTENSION}.sources[{i}]"
    raise refuse(path, f"{path} must be a width and a height in pixels")


def read_options(
    fields: Fields, extension: Extension, *, longest: int | None, tokens: bool
) -> Options:
    """Read the parameters that say how tokens are chosen and where an answer ends.

    Args:
        longest: most tokens, as the API at hand calls it.
        tokens: whether logprobs were asked for.

    Raises:
        ApiError: one is out of range.
    """
    temperature = fields.number("temperature", 0.0, 2.0)
    top_p = fields.number("top_p", 0.0, 1.0)
    seed = fields.integer("seed")
    if top_p == 0.0:
        temperature, top_p = 0.0, None  # the smallest set there is holds the likeliest token
    return Options(
        retransmit=extension.retransmit,
        eta=extension.eta,
        max_new_tokens=None if longest is None else min(longest, _MOST_TOKENS),
        stop=_stops(fields),
        temperature=temperature,
        top_p=top_p,
        seed=None if seed is None else seed % 2**63,
        tokens=tokens,
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    path = fields.path("stop")
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise refuse(path, f"{path} must be a text or a list of texts", "invalid_type")
    if len(stops) > _MAX_STOPS:
        raise refuse(path, f"{path}: {len(stops)} texts, more than {_MAX_STOPS}")
    if not all(1 <= len(each) <= _MAX_STOP_CHARS for each in stops):
        raise refuse(path, f"{path}: each text must have 1 to {_MAX_STOP_CHARS} characters")
    return tuple(stops)


def refuse_unsupported(fields: Fields) -> None:
    """What both APIs have and nothing here can honour, unless it asks for what happens anyway.

    Raises:
        ApiError: for the first that asks for more.
    """
    fields.only("top_logprobs", [0], "only the token that was chosen is told")
    fields.only("service_tier", ["auto", "default"], "there is one tier")
    fields.harmless(
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    )


def no_tools(fields: Fields) -> None:
    """Refuse tools; a choice among none is harmless.

    Raises:
        ApiError: there are tools.
    """
    fields.only("tools", [[]], "the model calls no tools")
    fields.only("tool_choice", ["none", "auto"], "the model calls no tools")


def check_detail(fields: Fields) -> None:
    """`detail` of a picture: accepted and without effect, since the model's uncertainty decides.

    Raises:
        ApiError: an unknown value.
    """
    known = ["auto", "low", "high", "original"]
    fields.only("detail", known, f"must be one of {', '.join(known)}")


def unsupported(param: str, message: str) -> ApiError:
    """A refusal of what nothing here can honour."""
    return refuse(param, f"{param}: {message}", UNSUPPORTED)
