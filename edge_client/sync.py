"""The synchronous client, for programs without an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from edge_client.answer import EdgeAnswer, TextSink
from edge_client.client import DEFAULT_DEADLINE_S, ClientOptions, EdgeClient, Text
from edge_client.link.dial import DEFAULT_URL
from edge_client.picture import PictureLike
from vlm_collab.errors import CollabError, LinkError
from vlm_collab.protocol.messages import Options, Welcome

T = TypeVar("T")


class Client:
    """`EdgeClient` without `await`: its event loop runs in a thread of its own.

    ::

        with Client("ws://server:8765") as client:
            answer = client.ask("photo.jpg", "What does the small sign say?")

    Connects when created. Several threads may ask at the same time. Close it when done.

    Args:
        url: `ws://host:port` or `wss://host:port`.
        options: see `ClientOptions`.

    Raises:
        CollabError: see `EdgeClient.connect`.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        self._client = EdgeClient(url, **options)
        self._loop = asyncio.new_event_loop()
        # Nothing may be submitted after the loop was stopped, because it would never run.
        self._submitting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name="edge-client", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect())
        except BaseException:
            self.close()
            raise

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
    def welcome(self) -> Welcome:
        """The server's `Welcome`; reconnects if necessary."""
        return self._run(self._client.connect())

    def ask(
        self,
        picture: PictureLike | Sequence[PictureLike],
        question: Text,
        *,
        history: Sequence[tuple[Text, str]] = (),
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        on_text: TextSink | None = None,
        options: Options | None = None,
    ) -> EdgeAnswer:
        """Ask a question about a picture; arguments and errors as for `EdgeClient.ask`.

        `on_text` is called in the client's own thread. An interrupt (Ctrl-C) cancels the
        question.
        """
        return self._run(
            self._client.ask(
                picture,
                question,
                history=history,
                deadline_s=deadline_s,
                on_text=on_text,
                options=options,
            )
        )

    def ask_many(
        self,
        items: Iterable[tuple[PictureLike, str]],
        *,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        options: Options | None = None,
    ) -> list[EdgeAnswer | CollabError]:
        """Ask many questions at once; see `EdgeClient.ask_many`."""
        return self._run(self._client.ask_many(items, deadline_s=deadline_s, options=options))

    def close(self) -> None:
        """Close the connection and end the thread. Closing twice does nothing."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        # Questions of other threads have got their error by now; let their tasks end.
        rest = asyncio.all_tasks(self._loop)
        for task in rest:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._submitting:
            if self._closed:
                work.close()
                raise LinkError("the client was closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise LinkError("the client was closed") from None
        except BaseException:
            future.cancel()
            raise


def ask(
    photo: PictureLike | Sequence[PictureLike],
    question: str,
    *,
    history: Sequence[tuple[str, str]] = (),
    server: str = DEFAULT_URL,
    deadline_s: float | None = DEFAULT_DEADLINE_S,
    on_text: TextSink | None = None,
    options: Options | None = None,
    **settings: Unpack[ClientOptions],
) -> EdgeAnswer:
    """Ask one question about one or several pictures, on a connection of its own.

    Args:
        photo: path of a picture, the content of its file, or a `Picture`; or several of these.
        question: the text.
        history: earlier (question, answer) pairs, oldest first.
        server: address of the service.
        deadline_s, on_text, options: see `EdgeClient.ask`.
        settings: see `ClientOptions`.

    Raises:
        CollabError: see `EdgeClient.ask`.
    """
    with Client(server, **settings) as client:
        return client.ask(
            photo,
            question,
            history=history,
            deadline_s=deadline_s,
            on_text=on_text,
            options=options,
        )
