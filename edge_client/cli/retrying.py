"""A client that keeps a question while the server is away, and reports its attempts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from edge_client.answer import EdgeAnswer, TextSink
from edge_client.client import ClientOptions
from edge_client.link.dial import LostError
from edge_client.picture import Picture
from edge_client.retry import Retry
from edge_client.sync import Client
from vlm_collab.errors import CollabError, DeadlineError, LinkError, ServerError
from vlm_collab.errors import ErrorCode as Code
from vlm_collab.protocol.messages import Fallback, Options, Welcome

_TOO_LONG = {Code.BAD_QUESTION, Code.TOO_LARGE}

_PAUSES = Retry(first_s=1.0, longest_s=15.0)

Turns = Sequence[tuple[str, str]]


class RetryingClient:
    """Asks one question at a time, and asks again while the server is away.

    Connects when the first question needs it. Errors that do not pass with time (a wrong token, a
    refused question) are raised at once.

    Args:
        url: address of the service.
        note: called, from any thread, with lines about the connection.
        forever: wait for the server without limit; otherwise until a question's deadline.
        settings: see `ClientOptions`.
    """

    def __init__(
        self,
        url: str,
        note: Callable[[str], None],
        *,
        forever: bool,
        settings: ClientOptions,
    ) -> None:
        self._url = url
        self._note = note
        self._forever = forever
        self._settings = settings
        self._client: Client | None = None
        self._welcome: Welcome | None = None
        self._log = _AttemptReporter(note)
        logger = logging.getLogger("edge_client.link.reconnect")
        logger.addHandler(self._log)
        logger.setLevel(logging.INFO)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def welcome(self) -> Welcome | None:
        """The latest `Welcome` of the server; None before the first."""
        return self._welcome

    def connect(self) -> None:
        """Try to connect, so that a wrong address is reported before the first question.

        Raises:
            CollabError: waiting would not help.
        """
        try:
            self._connected()
        except LinkError as error:
            if not is_transient(error):
                raise
            end = "it answers" if self._forever else "their deadline"
            self._note(f"{error}; questions wait until {end}")

    def ask(
        self,
        picture: Picture,
        question: str,
        *,
        history: Turns,
        deadline_s: float,
        on_text: TextSink | None,
        options: Options,
    ) -> EdgeAnswer:
        """Ask a question about a picture; see `EdgeClient.ask`.

        If a conversation is too long for the model, its older half is dropped, repeatedly if
        necessary.

        Raises:
            CollabError: see `EdgeClient.ask`; without `forever` also `LinkError`.
        """
        until = time.monotonic() + deadline_s
        failures = 0
        turns = history
        while True:
            left_s = deadline_s if self._forever else max(0.001, until - time.monotonic())
            try:
                client = self._connected()
                if self._welcome is not None and "history" not in self._welcome.features:
                    turns = ()
                answer = client.ask(
                    picture,
                    question,
                    history=turns,
                    deadline_s=left_s,
                    on_text=on_text,
                    options=options,
                )
            except (LinkError, DeadlineError) as error:
                if not (is_transient(error) or self._log.away):
                    raise
                failures += 1
                pause_s = _PAUSES.pause_s(failures)
                if not self._forever and time.monotonic() + pause_s >= until:
                    raise
                if self._forever:
                    self._note(f"{error}; the question waits (Ctrl-C cancels it)")
                time.sleep(pause_s)
            except ServerError as error:
                if error.code not in _TOO_LONG or not turns:
                    raise
                turns = turns[-(len(turns) // 2) :] if len(turns) > 1 else ()
            else:
                if answer.fallback is not Fallback.LINK_LOST:
                    self._log.answered()
                if len(turns) < len(history):
                    self._note(
                        "the conversation is too long for the model: only the last "
                        f"{len(turns)} of {len(history)} questions and answers were sent"
                    )
                self._update_welcome(client, answer)
                return answer

    def close(self) -> None:
        """Close the connection. Closing twice does nothing."""
        logging.getLogger("edge_client.link.reconnect").removeHandler(self._log)
        if self._client is not None:
            self._client.close()

    def _connected(self) -> Client:
        if self._client is None:
            self._client = Client(self._url, **self._settings)
            self._welcome = self._client.welcome
        return self._client

    def _update_welcome(self, client: Client, answer: EdgeAnswer) -> None:
        """Update `welcome` if another server or model answered."""
        old = self._welcome
        if old is None or (old.model, old.rows, old.columns) != (
            answer.model,
            answer.rows,
            answer.columns,
        ):
            try:
                self._welcome = client.welcome
            except CollabError:
                self._welcome = None  # lost again; the next answer tries again


def is_transient(error: CollabError) -> bool:
    """Whether the link failed, so that another attempt can help."""
    return isinstance(error, LostError) or (
        isinstance(error, LinkError | DeadlineError) and isinstance(error.__cause__, LostError)
    )


class _AttemptReporter(logging.Handler):
    """Reports attempts to reconnect, which `LinkKeeper` logs.

    Attributes:
        away: the server could not be reached, and has not answered since then.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note
        self.away = False

    def emit(self, record: logging.LogRecord) -> None:
        """Report the reason, once per outage."""
        if record.levelno >= logging.INFO and not self.away:
            self.away = True
            self._note(f"no server ({record.getMessage()}); trying again")

    def answered(self) -> None:
        """Note that the server has answered."""
        if self.away:
            self.away = False
            self._note("the server is back")
