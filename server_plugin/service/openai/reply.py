"""Turn the events of a question into a response in the form of either API."""

from __future__ import annotations

from typing import Any

from server_plugin.engines.two_stage import RegionNeed
from server_plugin.service.answering import Refused
from server_plugin.service.openai.pending import (
    FinalAnswer,
    PendingQuestion,
    RegionRequested,
    TextSoFar,
)
from server_plugin.service.openai.response_store import ByteTally
from server_plugin.service.openai.transport import Sender
from vlm_collab.errors import server_error
from vlm_collab.geometry import Size
from vlm_collab.openai import (
    ApiError,
    RegionReport,
    Report,
    Result,
    TextStream,
    api_error,
    stage_name,
)
from vlm_collab.protocol.messages import Stage
from vlm_collab.web.streams import StreamFormat


class AnswerStream:
    """Follows a question for one client, and streams its text.

    Args:
        question: cancelled if the client leaves.
        sender: to the client.
        writer: encodes the stream; None for a response in one piece.
    """

    def __init__(
        self, question: PendingQuestion, sender: Sender, writer: StreamFormat | None
    ) -> None:
        self._question, self._sender, self._writer = question, sender, writer
        self.flow = TextStream(question.options.stop)

    async def last_event(self) -> RegionRequested | FinalAnswer | None:
        """Wait for the event that ends the response; None if the question failed after the stream
        had begun, and the stream has ended with the error.

        Raises:
            Refused: it failed, and nothing has been sent yet.
            ClientGoneError: the client left.
        """
        begun = False
        try:
            while True:
                event = await self._question.next_event()
                if self._writer is not None and not begun:
                    begun = True
                    await self._sender.events(self._writer.start())
                match event:
                    case TextSoFar(stage, text):
                        await self._send_text(stage, text)
                    case RegionRequested() | FinalAnswer():
                        return event
        except Refused as refused:
            if self._writer is None or not begun:
                raise
            await self._sender.events(self._writer.error(error_of(refused)))
            await self._sender.end()
            return None
        except BaseException:
            self._question.cancel()
            raise

    async def _send_text(self, stage: Stage, text: str) -> None:
        if self._writer is not None:
            # Without a second pass, the first text is final too.
            stage = Stage.SECOND if self._question.one_pass else stage
            await self._sender.events(self._writer.delta(self.flow.feed(stage, text)))


def result_of(
    event: RegionRequested | FinalAnswer,
    *,
    model: str,
    tally: ByteTally,
    original_bytes: int | None,
    restarted: bool = False,
) -> Result:
    """An answer with its report; the first answer while the question waits for its region."""
    if isinstance(event, RegionRequested):
        need: RegionNeed | None = event.need
        answer = event.first_answer()
    else:
        need, answer = event.need, event
    report = Report(
        model=model,
        stage=stage_name(answer.stage),
        refined=answer.stage is Stage.SECOND,
        fallback=answer.fallback.name.lower(),
        uncertainty=answer.uncertainty,
        first_text=answer.text if need is None else need.first,
        first_uncertainty=answer.uncertainty if need is None else need.uncertainty,
        region=None if need is None else RegionReport(need.picture, need.box),
        bytes_up=tally.up,
        bytes_down=tally.down,
        view_bytes=tally.pictures,
        region_bytes=tally.region,
        original_bytes=original_bytes,
        restarted=restarted,
    )
    return Result(
        text=answer.text,
        report=report,
        finish=answer.finish,
        tokens=answer.tokens,
        prompt_tokens=answer.work.prefilled_tokens,
        completion_tokens=answer.work.decoded_tokens,
    )


def region_arguments(need: RegionNeed, source: Size, target: Size) -> dict[str, Any]:
    """Return the arguments of the region tool, for a client that knows only its own picture.

    Positions and sizes are shares of the upright picture's width and height. Multiplied by its
    size and rounded, they give whole pixels.
    """
    box = need.box
    return {
        "picture": need.picture,
        "left": box.left / source.width,
        "top": box.top / source.height,
        "width": box.width / source.width,
        "height": box.height / source.height,
        "target_width": target.width,
        "target_height": target.height,
    }


def error_of(refused: Refused, param: str | None = None) -> ApiError:
    """A refusal in OpenAI's form."""
    return api_error(server_error(refused.code, str(refused), refused.retry_after_s), param=param)
