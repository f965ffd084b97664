"""Answer questions at a running service, through the edge client; bytes are those really sent.

Each question sends its pictures, even if an earlier one was about the same picture, so that its
cost does not depend on the questions before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.client import EdgeClient
from edge_client.picture import Picture
from eval.lmms_plugin.originals import OriginalPicture
from eval.lmms_plugin.questions import LmmsQuestion
from eval.lmms_plugin.runner import AnswerSource, CostedAnswer
from eval.lmms_plugin.settings import DEFAULT_CONCURRENCY, LmmsSettings
from eval.runs.methods.method import SampleError, one_line
from eval.runs.methods.over_service import DEADLINE_S
from eval.runs.methods.two_stage import region_pixels
from vlm_collab.errors import (
    AuthenticationError,
    CollabError,
    ConfigError,
    LinkError,
    ProtocolError,
)
from vlm_collab.protocol.messages import Welcome
from vlm_collab.protocol.table import FITS

log = logging.getLogger(__name__)

_ENDS_THE_RUN = (LinkError, AuthenticationError, ProtocolError)
"""Errors that are not about one question."""


@dataclass(slots=True, eq=False)
class _PreparedQuestion:
    question: LmmsQuestion
    originals: Sequence[OriginalPicture]


class ServiceSource(AnswerSource):
    """A running service.

    Args:
        settings: settings of the model, with `server`.

    Raises:
        ConfigError: an impossible setting.
    """

    def __init__(self, settings: LmmsSettings) -> None:
        assert settings.server is not None
        self._settings = settings
        self._client = EdgeClient(
            settings.server,
            token=settings.token,
            view_codec=settings.picture_codec,
            view_quality=settings.view_quality or 90,
        )
        self._welcome: Welcome

    async def check(self) -> None:
        """Check that the service can be reached.

        Raises:
            CollabError: it cannot be reached, or refuses this edge.
        """
        try:
            await self._client.connect()
        finally:
            await self._client.close()

    async def open(self, questions: Sequence[LmmsQuestion]) -> None:
        self._welcome = await self._client.connect()
        if (warning := FITS[self._welcome.fit].warning) is not None:
            log.warning("the service: %s", warning)
        needed = {
            "stop": any(question.options.stop for question in questions),
            "sampling": any(question.options.temperature for question in questions),
        }
        for feature, used in needed.items():
            if used and feature not in self._welcome.features:
                raise ConfigError(f"this service lacks the feature {feature}, which the task needs")
        requested = self._settings.concurrency or DEFAULT_CONCURRENCY
        self.group = max(1, min(requested, self._welcome.max_in_flight))

    async def close(self) -> None:
        await self._client.close()

    def prepare(
        self, question: LmmsQuestion, originals: Sequence[OriginalPicture]
    ) -> _PreparedQuestion:
        return _PreparedQuestion(question, originals)

    async def answer(self, ready: Sequence[_PreparedQuestion]) -> list[CostedAnswer | SampleError]:
        return list(await asyncio.gather(*map(self._one, ready)))

    async def _one(self, ready: _PreparedQuestion) -> CostedAnswer | SampleError:
        question = ready.question
        pictures: list[Picture] = [one.picture for one in ready.originals]
        if len(pictures) > 1 and "pictures" not in self._welcome.features:
            return SampleError("this service takes no questions about several pictures")
        try:
            answer = await self._client.ask(
                pictures, question.text, options=question.options, deadline_s=DEADLINE_S
            )
        except _ENDS_THE_RUN:
            raise
        except CollabError as error:
            return SampleError(one_line(error))
        welcome, usage = self._welcome, answer.usage
        return CostedAnswer(
            text=answer.text,
            stage=answer.stage,
            fallback=answer.fallback,
            finish=answer.finish,
            uncertainty=answer.uncertainty,
            first_text=answer.first_text,
            first_uncertainty=answer.first_uncertainty,
            box=answer.box,
            picture=None if answer.box is None else answer.picture,
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
            view_bytes=answer.view_bytes,
            region_bytes=answer.region_bytes,
            view_pixels=len(pictures) * welcome.view_width * welcome.view_height,
            region_pixels=0 if answer.region is None else region_pixels(answer.region),
            prefilled_tokens=usage.prefilled_tokens,
            decoded_tokens=usage.decoded_tokens,
            mflops=usage.mflops,
            original_bytes=sum(one.original_bytes for one in ready.originals),
            own_files=all(one.own_file for one in ready.originals),
        )
