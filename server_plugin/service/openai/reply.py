"""From what happens to a question to what a client reads, in the form of either API."""

from __future__ import annotations

from typing import Any, Protocol

from server_plugin.engines.two_stage import RegionNeed
from server_plugin.service.answering import Refused
from server_plugin.service.openai.pending import Ended, Question, Said, Wanted
from server_plugin.service.openai.response_store import Tally
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


class Writer(Protocol):
    """Puts a stream into the form of one of the APIs."""

    def start(self) -> bytes: ...
    def delta(self, text: str) -> bytes: ...
    def finish(self, rest: str, result: Result) -> bytes: ...
    def error(self, error: ApiError) -> bytes: ...


class Reply:
    """Listens to a question for one client, and streams what can be told already.

    Args:
        question: what is listened to; it is cancelled if the client goes.
        sender: to the client.
        writer: of the stream; None for a response as a whole.
    """

    def __init__(self, question: Question, sender: Sender, writer: Writer | None) -> None:
        self._question, self._sender, self._writer = question, sender, writer
        self.flow = TextStream(question.options.stop)

    async def settled(self) -> Wanted | Ended | None:
        """How it goes; None if it failed after the stream had begun, which then has ended.

        Raises:
            Refused: it failed, and nothing has been sent yet.
            ClientGoneError: the client left.
        """
        begun = False
        try:
            while True:
                event = await self._question.next()
                if self._writer is not None and not begun:
                    begun = True
                    await self._sender.events(self._writer.start())
                match event:
                    case Said(stage, text):
                        await self._say(stage, text)
                    case Wanted() | Ended():
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

    async def _say(self, stage: Stage, text: str) -> None:
        if self._writer is not None:
            # A first text that no second one can replace is as good.
            stage = Stage.SECOND if self._question.one_pass else stage
            await self._sender.events(self._writer.delta(self.flow.feed(stage, text)))


def result_of(
    settled: Wanted | Ended,
    *,
    model: str,
    tally: Tally,
    original_bytes: int | None,
    restarted: bool = False,
) -> Result:
    """An answer, or the first one of a question that waits for its region, with its report."""
    if isinstance(settled, Wanted):
        need: RegionNeed | None = settled.need
        settled = settled.first()
    else:
        need = settled.need
    second = settled.stage is Stage.SECOND
    region = None if need is None else RegionReport(need.picture, need.box)
    report = Report(
        model=model,
        stage=stage_name(settled.stage),
        refined=second,
        fallback=settled.fallback.name.lower(),
        uncertainty=settled.uncertainty,
        first_text=settled.text if need is None else need.first,
        first_uncertainty=settled.uncertainty if need is None else need.uncertainty,
        region=region,
        bytes_up=tally.up,
        bytes_down=tally.down,
        view_bytes=tally.pictures,
        region_bytes=tally.region,
        original_bytes=original_bytes,
        restarted=restarted,
    )
    return Result(
        text=settled.text,
        report=report,
        finish=settled.finish,
        tokens=settled.tokens,
        prompt_tokens=settled.work.prefilled_tokens,
        completion_tokens=settled.work.decoded_tokens,
    )


def arguments_of(need: RegionNeed, source: Size, target: Size) -> dict[str, Any]:
    """Where to look, as a client that knows only its own picture understands it.

    Shares of the upright picture's width and height, which give back whole pixels when they are
    multiplied by its size and rounded.
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
    """What ended a question, in OpenAI's form."""
    return api_error(server_error(refused.code, str(refused), refused.retry_after_s), param=param)
