"""Answers questions from OpenAI requests through one `EdgeClient` that all requests share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Unpack

from edge_client.addresses import without_secrets
from edge_client.answer import EdgeAnswer, TextSink
from edge_client.client import ClientOptions, EdgeClient
from edge_client.gateway.config import GatewayConfig
from edge_client.gateway.fetch import Fetcher
from edge_client.gateway.upstream import TextUpstream
from edge_client.link.dial import Server
from edge_client.picture import Picture, PictureCache
from edge_client.privacy.guard import open_guard
from edge_client.retry import Retry
from vlm_collab.errors import CollabError, DeadlineError, ImageError, LinkError
from vlm_collab.openai import (
    Query,
    RegionReport,
    Report,
    Result,
    Url,
    api_error,
    check_model,
    check_text_length,
    refuse,
    refuse_pictures_in,
    stage_name,
)
from vlm_collab.protocol.image_positions import Place, places_in_turn, split_at_pictures
from vlm_collab.protocol.messages import CUT_MARK, Fallback, Finish, Welcome

log = logging.getLogger(__name__)

_FOREVER = Retry(attempts=2**31, longest_s=2.0)
"""The gateway never stops reconnecting; a question's deadline ends its own wait."""

_CONNECTED_WAIT_S = 0.05


class NoServerError(LinkError):
    """The server cannot be reached now."""


class Answerer:
    """Asks the server for answers under the rules of one camera.

    Args:
        config: see `GatewayConfig`.
        url: address of the service.
        album: keeps originals in memory for later questions.
        options: see `ClientOptions`; `policy`, `audit` and `decoder` apply to all requests.

    Attributes:
        camera: name of the camera whose rules apply.

    Raises:
        ConfigError: a setting is invalid.
    """

    def __init__(
        self,
        config: GatewayConfig,
        url: str,
        album: PictureCache,
        **options: Unpack[ClientOptions],
    ) -> None:
        limits = config.limits
        self._config = config
        self.server = Server(
            url=url,
            token=options.get("token"),
            ca_file=options.get("ca_file"),
            proxy=options.get("proxy"),
        )
        self._display_url = without_secrets(self.server.url)
        policy, camera = options.get("policy"), options.get("camera")
        self._guard = open_guard(policy, camera, None, self._display_url)
        self.camera = self._guard.policy.name
        self.watched = policy is not None or options.get("audit") is not None
        """Whether a policy or an audit log is in use."""
        settings: ClientOptions = {
            "retry": _FOREVER,
            "max_pixels": limits.max_pixels,
        }
        settings.update(options)
        self._client = EdgeClient(url, **settings)
        self._album = album
        self._fetcher = Fetcher(
            config.fetch_hosts,
            timeout_s=limits.fetch_timeout_s,
            max_bytes=limits.wire.max_picture_bytes,
        )
        self._texts = TextUpstream(self.server, timeout_s=config.deadline_s)

    @property
    def texts(self) -> TextUpstream:
        """The server's own OpenAI API, for requests without pictures."""
        return self._texts

    async def close(self) -> None:
        """Close all connections. Unanswered questions end with an error."""
        await self._client.close()
        await self._fetcher.close()
        await self._texts.close()

    async def welcome(self, within_s: float | None = None) -> Welcome:
        """The server's `Welcome` message; waits until the server can be reached.

        Args:
            within_s: longest wait; by default the deadline of a question.

        Raises:
            NoServerError: the server could not be reached in time.
            CollabError: see `EdgeClient.connect`.
        """
        within_s = self._config.deadline_s if within_s is None else within_s
        try:
            async with asyncio.timeout(within_s):
                return await self._client.connect()
        except TimeoutError:
            raise NoServerError(
                f"no server answers at {self._display_url}; the gateway keeps trying"
            ) from None

    def names(self, welcome: Welcome) -> tuple[str, ...]:
        """The names by which clients may call the model."""
        return (welcome.model, *self._config.aliases)

    async def model_name(self, query: Query) -> str:
        """The model's name for the response: the client's name for it, if it gave one.

        Raises:
            CollabError: see `welcome`.
        """
        return query.model or (await self.welcome()).model

    def check_time(self) -> None:
        """Check that the policy allows sending now.

        Raises:
            PrivacyError: it does not.
        """
        self._guard.check_time()

    def check_size(self, texts: Iterable[str], param: str = "messages") -> None:
        """Check the length of a question with its conversation.

        Args:
            texts: the question and the texts before it.
            param: the request's parameter, for the error.

        Raises:
            ApiError: it is longer than `max_question_bytes`.
        """
        limit = self._config.limits.max_question_bytes
        if limit is None:
            return
        size = sum(len(text.encode()) for text in texts)
        if size > limit:
            raise refuse(
                param,
                f"{param}: the question and its conversation have {size} bytes of text, "
                f"more than {limit} (--max-question-bytes)",
                "invalid_question",
            )

    async def answer(
        self, query: Query, on_text: TextSink | None, fetched: dict[Url, bytes] | None = None
    ) -> Result:
        """Ask a question.

        Args:
            query: the question.
            on_text: see `EdgeClient.ask`.
            fetched: receives the content of pictures that were fetched.

        Raises:
            ApiError: there is no answer; the error says why.
        """
        if query.sources:
            raise refuse(
                "vlm_collab.sources",
                "vlm_collab.sources: this gateway makes the views itself; send the originals",
                "unsupported_parameter",
            )
        texts = (query.question, *(text for turn in query.history for text in turn))
        self.check_size(texts, query.question_param)
        await asyncio.to_thread(_check_texts, query)
        try:
            self.check_time()
            until = asyncio.get_running_loop().time() + self._config.deadline_s
            welcome = await self.welcome()
            check_model(query.model, self.names(welcome))
            if not query.pictures:
                return await self._texts.ask(query, welcome.model, on_text)
            _check_features(query, welcome)
            pictures, numbers = await self._pictures(query, {} if fetched is None else fetched)
            left_s = max(0.001, until - asyncio.get_running_loop().time())
            places = [one._replace(picture=numbers[one.picture]) for one in query.places]
            answer = await self._ask(query, pictures, places, on_text, left_s)
            log.info(
                "%d pictures, %s answer: %d of %s bytes up, %.2f s",
                len(pictures),
                "refined" if answer.refined else "first",
                answer.bytes_up,
                answer.original_bytes,
                answer.elapsed_s,
            )
            return _result(answer)
        except CollabError as error:
            raise api_error(error, param=query.question_param) from error

    async def _pictures(
        self, query: Query, fetched: dict[Url, bytes]
    ) -> tuple[list[Picture], list[int]]:
        """Fetch and open a question's pictures. Those with the same content are opened once.

        Returns:
            the pictures, and for each picture of the query its index in them.
        """
        params = query.picture_params

        async def content(source: bytes | Url, param: str) -> bytes:
            if isinstance(source, bytes):
                return source
            fetched[source] = await self._fetcher.fetch(source, param)
            return fetched[source]

        contents = await asyncio.gather(*map(content, query.pictures, params))
        found: dict[bytes, str] = {}
        for each, param in zip(contents, params, strict=True):
            found.setdefault(each, param)
        numbers = {each: number for number, each in enumerate(found)}
        opened = await asyncio.gather(*map(self._open, found, found.values()))
        return list(opened), [numbers[each] for each in contents]

    async def _open(self, content: bytes, param: str) -> Picture:
        try:
            return await asyncio.to_thread(self._album.get, content)
        except ImageError as error:
            raise api_error(error, param=param) from error

    async def _ask(
        self,
        query: Query,
        pictures: list[Picture],
        places: Sequence[Place],
        on_text: TextSink | None,
        left_s: float,
    ) -> EdgeAnswer:
        def with_places(turn: int, text: str) -> list[str | int]:
            return split_at_pictures(text, places_in_turn(places, turn))

        try:
            return await self._client.ask(
                pictures,
                with_places(len(query.history), query.question),
                history=[
                    (with_places(i, question), answer)
                    for i, (question, answer) in enumerate(query.history)
                ],
                deadline_s=left_s,
                on_text=on_text,
                options=query.options,
            )
        except DeadlineError:
            await self.welcome(_CONNECTED_WAIT_S)  # raises NoServerError if that is the reason
            raise DeadlineError(f"no answer within {self._config.deadline_s:g} s") from None
        except ImageError as error:
            param = query.picture_params[0] if len(pictures) == 1 else query.question_param
            raise api_error(error, param=param) from error


def _check_texts(query: Query) -> None:
    """Refuse texts that contain an encoded picture, which would be sent in full.

    Raises:
        ApiError: there is one.
    """
    texts = (query.question, *(text for turn in query.history for text in turn))
    check_text_length(sum(map(len, texts)), query.question_param)
    for text in texts:
        refuse_pictures_in(text, query.question_param)


def _check_features(query: Query, welcome: Welcome) -> None:
    """Refuse a question that needs a feature which this server lacks.

    Raises:
        ApiError: it lacks one.
    """
    options, where = query.options, query.question_param
    wanted = (
        (bool(options.stop), "stop", "stop"),
        (bool(options.temperature), "sampling", "temperature"),
        (options.tokens, "tokens", "logprobs"),
        (bool(query.history), "history", where),
        (len(query.pictures) > 1, "pictures", where),
        (bool(query.places), "places", where),
    )
    for needed, feature, param in wanted:
        if needed and feature not in welcome.features:
            text = f"{param}: the server of the model {welcome.model} does not support {feature}"
            raise refuse(param, text, "unsupported_parameter")


def _result(answer: EdgeAnswer) -> Result:
    box = answer.box
    cut = answer.fallback is not Fallback.NONE and answer.text.endswith(CUT_MARK)
    return Result(
        text=answer.text,
        report=Report(
            model=answer.model,
            stage=stage_name(answer.stage),
            refined=answer.refined,
            fallback=answer.fallback.name.lower(),
            declined=None if answer.declined is None else answer.declined.name.lower(),
            uncertainty=answer.uncertainty,
            first_text=answer.first_text,
            first_uncertainty=answer.first_uncertainty,
            region=None if box is None else RegionReport(answer.picture, box),
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
            view_bytes=answer.view_bytes,
            region_bytes=answer.region_bytes,
            original_bytes=answer.original_bytes,
        ),
        # The partial text that replaces a lost second answer may be cut off.
        finish=Finish.LENGTH if cut else answer.finish,
        tokens=answer.tokens,
        prompt_tokens=answer.usage.prefilled_tokens,
        completion_tokens=answer.usage.decoded_tokens,
    )
