"""Convert lmms-eval's requests into questions of the protocol."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.lmms_plugin.settings import DEFAULT_MAX_NEW_TOKENS, LmmsSettings
from eval.runs.methods.method import SampleError
from server_plugin.models.presets import IMAGE_SLOT
from vlm_collab.errors import ConfigError
from vlm_collab.protocol.messages import Options

_MOST_STOP_TEXTS, _LONGEST_STOP_TEXT = 4, 64
_KNOWN = {
    "until", "max_new_tokens", "max_gen_toks", "temperature", "top_p", "do_sample", "num_beams",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LmmsQuestion:
    """One request.

    Attributes:
        task, split, doc_id: the document it is about.
        text: the prompt.
        options: the request's options, as sent to the server.
        visuals: function that returns a document's pictures.
        padding: whether it was added only to give all processes equally many questions.
    """

    task: str
    split: str
    doc_id: int
    text: str
    options: Options
    visuals: Callable[[Mapping[str, Any]], Any]
    padding: bool = False

    @property
    def name(self) -> str:
        """Name of the question in messages."""
        return f"{self.task}, document {self.doc_id}"


def questions_of(
    requests: Sequence[Any], settings: LmmsSettings, warn: Callable[[str], None]
) -> list[LmmsQuestion]:
    """Convert the requests of `generate_until`.

    Args:
        requests: instances with arguments (context, generation options, pictures, document,
            task, split).
        settings: of the model.
        warn: called once for each option that has no effect here.

    Raises:
        ConfigError: a generation option cannot be applied.
    """
    repeats: Counter[tuple[str, int]] = Counter()
    warned: set[str] = set()
    questions = []
    for request in requests:
        text, generation, visuals, doc_id, task, split = request.args
        key = f"{settings.seed}:{task}:{doc_id}:{repeats[task, doc_id]}"
        repeats[task, doc_id] += 1
        for name in sorted(generation.keys() - _KNOWN - warned):
            warned.add(name)
            warn(f"{task}: the generation option {name} has no effect on vlm_collab")
        question = LmmsQuestion(
            task=task,
            split=split,
            doc_id=doc_id,
            # Pictures always come before the question, so their positions in it have no effect.
            text=text.replace(IMAGE_SLOT, "").strip() if IMAGE_SLOT in text else text,
            options=_options(generation, settings, task, seed=zlib.crc32(key.encode())),
            visuals=visuals,
            padding=bool(request.metadata.get("__padding_only__")),
        )
        questions.append(question)
    return questions


def _options(
    generation: Mapping[str, Any], settings: LmmsSettings, task: str, *, seed: int
) -> Options:
    beams = generation.get("num_beams") or 1
    if beams != 1:
        raise ConfigError(
            f"{task} sets num_beams={beams}, but vlm_collab has no beam search; "
            "use `--gen_kwargs num_beams=1` for greedy answers"
        )
    longest = generation.get("max_new_tokens") or generation.get("max_gen_toks")
    limit = int(longest or DEFAULT_MAX_NEW_TOKENS)
    temperature = float(generation.get("temperature") or 0.0)
    draws = temperature > 0 and generation.get("do_sample") is not False
    return Options(
        retransmit=settings.retransmit,
        # In this process, the engine already has the threshold.
        eta=settings.eta if settings.server is not None else None,
        max_new_tokens=settings.max_new_tokens or limit,
        stop=_stop_texts(generation.get("until"), task),
        temperature=temperature if draws else None,
        top_p=(generation.get("top_p") or None) if draws else None,
        seed=seed if draws else None,
    )


def _stop_texts(until: str | Sequence[str] | None, task: str) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else list(until or ())
    stops = tuple(dict.fromkeys(text for text in texts if text))
    if len(stops) > _MOST_STOP_TEXTS or any(len(stop) > _LONGEST_STOP_TEXT for stop in stops):
        raise ConfigError(
            f"{task} has {len(stops)} stop texts; the protocol takes at most "
            f"{_MOST_STOP_TEXTS}, each of at most {_LONGEST_STOP_TEXT} characters"
        )
    return stops


def require_pictures(pictures: Sequence[Any]) -> None:
    """Check that a question has a picture.

    Raises:
        SampleError: there is none.
    """
    if not pictures:
        raise SampleError("the question has no picture, and vlm_collab needs one")
