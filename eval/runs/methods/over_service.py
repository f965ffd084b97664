"""The two-stage method over a running service: the edge client and real bytes.

Each sample is asked twice, each time with a new view. One question forces the second stage, and
gives everything but the first answer's tokens; the other forbids the second stage, and gives these
tokens. A service does not report token ids, Shannon entropy and margin. Without the feature
`tokens`, it does not report min-entropy either. These columns stay empty. FLOPs of the generic
instruction are counted with the second pass, and the map has eight bits, as on the wire. Byte
counts are those really sent, minus the options that only the run needs (map, tokens, stage).

A service batches questions as they arrive, so results repeat up to rounding, not bit by bit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_client.answer import EdgeAnswer
from edge_client.client import EdgeClient
from edge_client.link.link import CODECS
from edge_client.picture import Picture
from eval.analysis.records import TWO_STAGE, Record
from eval.runs.methods.method import (
    REFERENCE_QUALITY,
    EdgeSample,
    Method,
    SampleError,
    Scores,
    as_sample_error,
    one_line,
)
from eval.runs.methods.two_stage import columns_without_second_pass, region_pixels
from eval.runs.wire import message_bytes
from eval.tasks.base import Sample, Task
from vlm_collab.errors import (
    AuthenticationError,
    CollabError,
    ConfigError,
    LinkError,
    ProtocolError,
)
from vlm_collab.geometry import Box, Size
from vlm_collab.pictures.images import Codec, choose_codec, read_header
from vlm_collab.protocol.messages import (
    Answer,
    Ask,
    Fallback,
    Finish,
    Options,
    Region,
    RegionRequest,
    Retransmit,
    Stage,
    Welcome,
    micro,
)
from vlm_collab.protocol.table import FITS

log = logging.getLogger(__name__)

DEADLINE_S = 600.0
"""Deadline for one question. With many in flight, most of it is waiting for the model."""

_GROUP = 16
_MOST_STOP_TEXTS = 4

_ENDS_THE_RUN = (LinkError, AuthenticationError, ProtocolError)
"""Errors that are not caused by a single sample."""


@dataclass(slots=True, eq=False)
class _ServiceSample:
    """A sample for both questions.

    Attributes:
        edge_sample: the sample.
        again: its picture, opened a second time, because the client sends only one view per
            `Picture`.
        reference_bytes: size of the global view as JPEG of `REFERENCE_QUALITY`.
    """

    edge_sample: EdgeSample
    again: Picture
    reference_bytes: int


class OverService(Method):
    """Both passes of every sample, by a running service.

    Args:
        task: the benchmark.
        url, token: address of the service, and its token.
        codec, view_quality: encoding of views; None leaves the codec to the service. Regions are
            encoded as the service asks.
        max_new_tokens: longest answer; None takes the benchmark's.
    """

    name = TWO_STAGE
    group = _GROUP

    def __init__(
        self,
        task: Task,
        url: str,
        token: str | None,
        *,
        codec: Codec | None = None,
        view_quality: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self._task, self._score = task, Scores(task)
        self._limit = max_new_tokens or task.max_new_tokens
        self._quality = 90 if view_quality is None else view_quality
        self._given_codec = codec
        self._client = EdgeClient(url, token=token, view_codec=codec, view_quality=self._quality)
        self._welcome: Welcome

    async def open(self) -> None:
        self._welcome = await self._client.connect()
        if (warning := FITS[self._welcome.fit].warning) is not None:
            log.warning("the service: %s", warning)
        if self._task.stop and "stop" not in self._welcome.features:
            raise ConfigError("this service does not take stop texts, which the benchmark needs")
        if len(self._task.stop) > _MOST_STOP_TEXTS:
            raise ConfigError(
                f"a service takes at most {_MOST_STOP_TEXTS} stop texts; the task has more"
            )

    async def close(self) -> None:
        await self._client.close()

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        welcome = self._welcome
        model = {
            "name": welcome.model,
            "weights": None,
            "preset": None,
            "dtype": None,
            "device": None,
            "view": [welcome.view_width, welcome.view_height],
            "grid": [welcome.rows, welcome.columns],
            "service": True,
        }
        codec = self._given_codec or choose_codec(CODECS, welcome.codecs)
        return model, {"view": [codec.name.lower(), self._quality], "region": None}

    def prepare(self, index: int, sample: Sample) -> _ServiceSample:
        data: bytes = as_sample_error("the picture", sample.picture)
        picture: Picture = as_sample_error("the picture", lambda: Picture.open(data))
        welcome = self._welcome
        side, fit = Size(welcome.view_width, welcome.view_height), FITS[welcome.fit]
        reference: bytes = as_sample_error(
            "the picture", lambda: picture.view(side, fit, Codec.JPEG, REFERENCE_QUALITY)
        )
        return _ServiceSample(
            EdgeSample(index, sample, picture), Picture.open(data), len(reference)
        )

    async def answer(self, ready: Sequence[_ServiceSample]) -> list[Record | SampleError]:
        return list(await asyncio.gather(*map(self._one, ready)))

    async def _one(self, ready: _ServiceSample) -> Record | SampleError:
        edge_sample = ready.edge_sample
        always, never = self._options(Retransmit.ALWAYS), self._options(Retransmit.NEVER)
        try:
            refined, first = await asyncio.gather(
                self._ask(edge_sample.picture, edge_sample.sample, always),
                self._ask(ready.again, edge_sample.sample, never),
            )
        except _ENDS_THE_RUN:
            raise
        except CollabError as error:
            return SampleError(one_line(error))
        if refined.fallback is Fallback.NO_DETAIL:
            return self._record_of_view(ready, refined, first, always)
        if refined.stage is not Stage.SECOND or refined.region is None or refined.box is None:
            return SampleError(f"the second stage failed: {refined.fallback.name}")
        return self._record(ready, refined, first, always, refined.region, refined.box)

    async def _ask(self, picture: Picture, sample: Sample, options: Options) -> EdgeAnswer:
        return await self._client.ask(
            picture, sample.question, options=options, deadline_s=DEADLINE_S
        )

    def _options(self, retransmit: Retransmit) -> Options:
        return Options(
            retransmit=retransmit,
            max_new_tokens=self._limit,
            want_map=retransmit is Retransmit.ALWAYS,
            stop=tuple(self._task.stop),
            tokens="tokens" in self._welcome.features,
        )

    def _record(
        self,
        ready: _ServiceSample,
        refined: EdgeAnswer,
        first: EdgeAnswer,
        options: Options,
        region: bytes,
        box: Box,
    ) -> Record:
        edge_sample, welcome = ready.edge_sample, self._welcome
        sizes = _sizes(edge_sample, refined, options, region)
        return Record(
            **edge_sample.facts(),
            view_bytes=refined.view_bytes,
            region_bytes=refined.region_bytes,
            view_pixels=welcome.view_width * welcome.view_height,
            region_pixels=region_pixels(region),
            **sizes,
            first_answer_bytes=message_bytes(_answer(first), up=False),
            reference_bytes=ready.reference_bytes,
            first_text=first.text,
            second_text=refined.text,
            first_score=self._score(first.text, edge_sample.sample),
            second_score=self._score(refined.text, edge_sample.sample),
            **_statistics("first", first),
            **_statistics("second", refined),
            map=[value / 255 for value in refined.map or b""],
            map_rows=refined.rows if refined.map else 0,
            map_columns=refined.columns if refined.map else 0,
            box=list(box),
            side_px=max(box.width, box.height),
            first_mflops=first.usage.mflops,
            look_mflops=0,
            second_mflops=max(refined.usage.mflops - first.usage.mflops, 0),
            first_s=first.usage.first_ms / 1000,
            look_s=0.0,
            second_s=refined.usage.second_ms / 1000,
            edge_s=0.0,
            # The view was new, so the whole prompt was computed.
            first_input_tokens=first.usage.prefilled_tokens,
        )

    def _record_of_view(
        self, ready: _ServiceSample, forced: EdgeAnswer, first: EdgeAnswer, options: Options
    ) -> Record:
        """The row of a sample whose view already shows all that a region would."""
        edge_sample, welcome = ready.edge_sample, self._welcome
        score = self._score(first.text, edge_sample.sample)
        answer_bytes = message_bytes(_answer(first), up=False)
        return Record(
            **edge_sample.facts(),
            view_bytes=first.view_bytes,
            view_pixels=welcome.view_width * welcome.view_height,
            ask_bytes=forced.bytes_up - forced.view_bytes - _option_bytes(edge_sample, options),
            first_answer_bytes=answer_bytes,
            reference_bytes=ready.reference_bytes,
            first_text=first.text,
            first_score=score,
            **_statistics("first", first),
            first_input_tokens=first.usage.prefilled_tokens,
            first_mflops=first.usage.mflops,
            look_mflops=max(forced.usage.mflops - first.usage.mflops, 0),
            first_s=first.usage.first_ms / 1000,
            look_s=0.0,
            edge_s=0.0,
            **columns_without_second_pass(
                text=first.text,
                score=score,
                answer_bytes=answer_bytes,
                statistics=_statistics("second", first),
            ),
        )


def _statistics(which: str, answer: EdgeAnswer) -> dict[str, Any]:
    """The columns of an answer's tokens. In a greedy answer, surprisal equals min-entropy."""
    return {
        f"{which}_tokens": [],
        f"{which}_min_entropy": [token.surprisal_micro / 1e6 for token in answer.tokens],
        f"{which}_entropy": [],
        f"{which}_margin": [],
        f"{which}_ended": answer.finish is Finish.END,
    }


def _sizes(
    edge_sample: EdgeSample, refined: EdgeAnswer, options: Options, region: bytes
) -> dict[str, Any]:
    """Distribute the counted bytes among the messages.

    The bytes of the run's own options are subtracted. Ids have a fixed size here; on the wire they
    grow by some bytes with the number of questions, which counts for the question and the request.
    """
    of_options = _option_bytes(edge_sample, options)
    reply = message_bytes(Region(1, region), up=True) - len(region)
    ask = refined.bytes_up - refined.view_bytes - refined.region_bytes - reply - of_options
    plain = message_bytes(_answer(refined), up=False)
    with_tokens = message_bytes(
        msgspec.structs.replace(_answer(refined), tokens=refined.tokens), up=False
    )
    header = read_header(region, max_pixels=2**31)
    request = RegionRequest(
        1,
        refined.first_text,
        micro(refined.first_uncertainty),
        0,
        max(edge_sample.picture.size),
        1,
        1,
        header.width,
        header.height,
        header.codec,
        90,
        10_000,
    )
    with_map = msgspec.structs.replace(request, map=refined.map or b"")
    map_bytes = message_bytes(with_map, up=False) - message_bytes(request, up=False)
    return {
        "ask_bytes": ask,
        "request_bytes": refined.bytes_down - with_tokens - map_bytes,
        "reply_bytes": reply,
        "answer_bytes": plain,
    }


def _option_bytes(edge_sample: EdgeSample, options: Options) -> int:
    """Bytes that the run's own options add to a question."""
    question, source = edge_sample.sample.question, edge_sample.picture.size
    return message_bytes(Ask(1, question, 1, None, *source, options), up=True) - message_bytes(
        Ask(1, question, 1, None, *source), up=True
    )


def _answer(answer: EdgeAnswer) -> Answer:
    """The message in which the answer came, without its tokens."""
    return Answer(
        1,
        answer.text,
        answer.stage,
        answer.fallback,
        micro(answer.uncertainty),
        answer.usage,
        answer.finish,
    )
