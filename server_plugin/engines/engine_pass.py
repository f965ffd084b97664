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
    """One pass: follows its text, ends it at a stop text, and reports its tokens."""

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
        """Callback for the text; None if no one needs it, which saves decoding every token."""
        needed = self._on_text is not None or bool(self._stops) or self._with_tokens
        return self._receive if needed else None

    def _receive(self, text: str) -> None:
        for stop in self._stops:
            before, found, _ = text.partition(stop)
            if found:
                text, self._stopped = before.rstrip(), True
        self._texts.append(text)
        if self._on_text is not None:
            self._on_text(self._stage, text)

    def stop_rule(self, other: StopRule | None) -> StopRule | None:
        """Return a rule that stops at a stop text, or where `other` does.

        It relies on backends reporting the text before they call the rule.
        """
        if not self._stops:
            return other
        return lambda steps, ended: self._stopped or (other is not None and other(steps, ended))

    @property
    def generation(self) -> Generation:
        """The backend's result."""
        assert self.result is not None, "the pass is not over"
        return self.result

    @property
    def text(self) -> str:
        """The answer, up to a stop text."""
        return self._texts[-1] if self._stopped else self.generation.text

    @property
    def steps(self) -> tuple[TokenStatistics, ...]:
        """Statistics of the generated tokens."""
        return self.generation.steps

    @property
    def ended(self) -> bool:
        """Whether the last token is the end of the sequence."""
        return self.generation.ended

    @property
    def finish(self) -> Finish:
        """Why the answer ends."""
        if self._stopped:
            return Finish.STOP
        return Finish.END if self.ended else Finish.LENGTH

    def tokens(self) -> tuple[Token, ...]:
        """Return the tokens of the text, if they were requested; else nothing.

        A later token can change the last characters of the text so far. A token's text therefore
        is the part of the final text that is settled with it.
        """
        if not self._with_tokens:
            return ()
        final, start, tokens = self.text, 0, []
        for text, bits in zip(self._texts, self.generation.surprisals, strict=True):
            stop = max(start, common_prefix(text, final))
            tokens.append(Token(final[start:stop], micro(bits)))
            start = stop
        return tuple(tokens)


def decide(
    policy: Policy,
    steps: Sequence[TokenStatistics],
    ended: bool,
    retransmit: Retransmit,
    key: str,
) -> Decision:
    """Return the policy's decision, or the caller's if `retransmit` forces or forbids a region."""
    decision = policy.decide(steps, ended=ended, key=key)
    if retransmit is Retransmit.AUTO:
        return decision
    return decision._replace(retransmit=retransmit is Retransmit.ALWAYS)


def early_stop_rule(policy: Policy, retransmit: Retransmit, key: str) -> StopRule | None:
    """Return a rule that stops a first answer once it is certain that a second pass follows.

    The policy's decision on the tokens that it needs is its decision on the whole answer.

    Returns:
        None if the policy cannot decide before the end of the answer.
    """
    if policy.tokens_needed is None or retransmit is Retransmit.NEVER:
        return None

    def stop(steps: Sequence[TokenStatistics], ended: bool) -> bool:
        enough = policy.ready_after(steps)
        return enough and decide(policy, steps, ended, retransmit, key).retransmit

    return stop
