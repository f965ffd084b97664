"""One pass of the engine: its text as it grows, its end, and the decision on its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server_plugin.backends.base import Generation, StopRule
from vlm_collab.method.policy import Decision, Policy
from vlm_collab.method.uncertainty import TokenStatistics
from vlm_collab.protocol.messages import Finish, Retransmit, Stage, Token, common_prefix, micro

TextSink = Callable[[Stage, str], None]
"""Receives the text of a pass so far. May run on a backend's thread."""


class EnginePass:
    """One pass: listens to its text, ends it at a stop text, and says what it is made of."""

    def __init__(
        self, stage: Stage, stops: Sequence[str], tokens: bool, on_text: TextSink | None
    ) -> None:
        self.result: Generation | None = None
        self._stage, self._stops, self._with_tokens = stage, tuple(stops), tokens
        self._on_text = on_text
        self._texts: list[str] = []
        self._stopped = False

    @property
    def sink(self) -> Callable[[str], None] | None:
        """Hears the text; None if nobody needs it, which spares the spelling of every token."""
        needed = self._on_text is not None or bool(self._stops) or self._with_tokens
        return self._hear if needed else None

    def _hear(self, text: str) -> None:
        for stop in self._stops:
            before, found, _ = text.partition(stop)
            if found:
                text, self._stopped = before.rstrip(), True
        self._texts.append(text)
        if self._on_text is not None:
            self._on_text(self._stage, text)

    def stop_rule(self, other: StopRule | None) -> StopRule | None:
        """Stops at a stop text, or when another rule does. Backends tell the text first."""
        if not self._stops:
            return other
        return lambda steps, ended: self._stopped or (other is not None and other(steps, ended))

    @property
    def generation(self) -> Generation:
        """What the backend returned."""
        assert self.result is not None, "the pass is not over"
        return self.result

    @property
    def text(self) -> str:
        """The answer, up to a stop text."""
        return self._texts[-1] if self._stopped else self.generation.text

    @property
    def steps(self) -> tuple[TokenStatistics, ...]:
        """Statistics of its tokens."""
        return self.generation.steps

    @property
    def ended(self) -> bool:
        """Whether its last token is the end of the sequence."""
        return self.generation.ended

    @property
    def finish(self) -> Finish:
        """Why it ends."""
        if self._stopped:
            return Finish.STOP
        return Finish.END if self.ended else Finish.LENGTH

    def tokens(self) -> tuple[Token, ...]:
        """The tokens that its text is made of, if that was asked for.

        A later token can change how the last characters are spelled, so what a token adds is
        measured by how much of the final text stands after it.
        """
        if not self._with_tokens:
            return ()
        whole, place, tokens = self.text, 0, []
        for text, bits in zip(self._texts, self.generation.surprisals, strict=True):
            after = max(place, common_prefix(text, whole))
            tokens.append(Token(whole[place:after], micro(bits)))
            place = after
        return tuple(tokens)


def decide(
    policy: Policy,
    steps: Sequence[TokenStatistics],
    ended: bool,
    retransmit: Retransmit,
    key: str,
) -> Decision:
    decision = policy.decide(steps, ended=ended, key=key)
    if retransmit is Retransmit.AUTO:
        return decision
    return decision._replace(retransmit=retransmit is Retransmit.ALWAYS)


def early_stop_rule(policy: Policy, retransmit: Retransmit, key: str) -> StopRule | None:
    """Stops a first answer once it is known that a second pass follows; None if that is never
    known before its end.

    What `decide` says of the tokens that are enough is what it says of the whole answer.
    """
    if policy.tokens_needed is None or retransmit is Retransmit.NEVER:
        return None

    def stop(steps: Sequence[TokenStatistics], ended: bool) -> bool:
        enough = policy.ready_after(steps)
        return enough and decide(policy, steps, ended, retransmit, key).retransmit

    return stop
