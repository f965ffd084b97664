"""Prompts as token ids, with the positions of their pictures.

The whole prompt is tokenised at once, with pictures as runs of the image token, so the ids are
those that the checkpoint's own processor gives. Only the template and its pictures contribute
special tokens: a user's text that quotes one is plain text
(`server_plugin.backends.transformers.adapters.tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.transformers.adapters.tokens import PlainText, Tokenizer
from server_plugin.models.presets import ANSWER_SLOT, IMAGE_SLOT, QUESTION_SLOT
from vlm_collab.errors import QuestionError
from vlm_collab.protocol.image_positions import (
    Place,
    Places,
    TurnPlaces,
    places_fault,
    places_in_turn,
    split_at_pictures,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        ids: all token ids, image tokens included.
        images: positions of each run of visual tokens, in order. Without places: each global view
            once, then the local view.
        views: number of global views.
        interleaved: for an interleaved prompt, the picture of each run in `images`: the index of
            a global view, or `views` for the local view. Empty: each picture once, in order.
    """

    ids: tuple[int, ...]
    images: tuple[range, ...]
    views: int = 1
    interleaved: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """Length of the part up to the end of the global views.

        It is the same for all questions that are not interleaved with pictures.
        """
        return self.images[self.views - 1].stop if self.views else 0

    @property
    def order(self) -> tuple[int, ...]:
        """Index of the picture of each run in `images`."""
        return self.interleaved or tuple(range(len(self.images)))

    @property
    def views_span(self) -> range:
        """Positions from the first global view to the end of the last, with all text between."""
        runs = [run for run, picture in self.runs() if picture < self.views]
        return range(runs[0].start, runs[-1].stop)

    def runs(self) -> list[tuple[range, int]]:
        """Return each run of visual tokens with the index of its picture."""
        return list(zip(self.images, self.order, strict=True))


class PromptBuilder:
    """Fills a template with questions.

    Args:
        tokenizer: the checkpoint's tokenizer.
        template: has one `<image>` before one `{question}`. Pictures with places stand at these
            places; only those at the very beginning replace `<image>`.
        image_token: the checkpoint's text for a visual token.
        image_token_id: its id.
        around_picture: the checkpoint's text before and after each picture's tokens.
        visual_tokens: tokens of one picture.
        context_tokens: longest sequence that the model takes, answer included.
        turn: template of each further turn of a conversation, with one `{answer}` before one
            `{question}`; None: no conversations.

    Raises:
        ModelError: the tokenizer cannot tell special tokens from text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        image_token: str,
        image_token_id: int,
        visual_tokens: int,
        context_tokens: int,
        around_picture: tuple[str, str] = ("", ""),
        turn: str | None = None,
    ) -> None:
        self._plain = plain = PlainText(tokenizer)
        self._image_token_id = image_token_id
        first, last = around_picture
        self._picture = plain.template(f"{first}{image_token}{last}")
        self._visual_tokens = visual_tokens
        self._context_tokens = context_tokens
        before, _, rest = template.partition(IMAGE_SLOT)
        middle, _, after = rest.partition(QUESTION_SLOT)
        self._before, self._middle, self._after = map(plain.template, (before, middle, after))
        self._turn = turn if turn is None else plain.template(turn)
        # White space between pictures and the text after them.
        self._gap = self._middle[: len(self._middle) - len(self._middle.lstrip())]
        # A character outside the vocabulary may become the unknown token, which in some tokenizers
        # is also the end of the text.
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._reserved_ids = set(tokenizer.added_tokens_decoder) - ({tokenizer.unk_token_id} - ends)
        self._own_reserved: dict[tuple[int, ...], int] = {}
        # Longest token, in characters: a text much longer than the context is refused before it is
        # tokenised.
        self._token_chars = max(len(token) for token in tokenizer.get_vocab())

    def check(self, request: GenerationRequest, images: int) -> None:
        """Refuse a question for which no prompt can be built.

        Args:
            request: see `build`.
            images: number of different pictures, the local view included if there may be one.

        Raises:
            QuestionError: the question or an earlier text is empty, no valid Unicode, or leaves no
                room for pictures and answer; the template has no form for conversations; or the
                places are invalid.
        """
        history, places = request.history, request.places
        if history and self._turn is None:
            raise QuestionError("this model's prompt template takes single questions only")
        for question, answer in history:
            self._check_text(question, "an earlier question")
            self._check_text(answer, "an earlier answer", may_be_empty=True)
        self._check_text(request.question, "the question")
        questions = (*(question for question, _ in history), request.question)
        pictures = 1 + max((place.picture for place in places), default=-1)
        fault = places_fault(places, questions, pictures)
        if fault is not None or pictures > images:
            raise QuestionError(fault or f"places of {pictures} pictures, but there are {images}")
        runs = _run_places(images, places, pictures, pictures - 1)
        ids = self._encode(request, runs)
        # A tokenizer could produce a reserved token by its ordinary rules. No known one does.
        key = len(runs), len(history)
        if key not in self._own_reserved:
            in_front = _run_places(len(runs), (), 0, 0)
            same_shape = GenerationRequest("?", history=(("?", "?"),) * len(history))
            plain = self._encode(same_shape, in_front)
            self._own_reserved[key] = self._count_reserved(plain)
        if self._count_reserved(ids) != self._own_reserved[key]:
            raise QuestionError("the question spells a token that this model reserves")
        self._check_length(len(ids), len(runs), request.max_new_tokens or 0)

    def _check_text(self, text: str, what: str, *, may_be_empty: bool = False) -> None:
        if not (may_be_empty or text.strip()):
            raise QuestionError(f"{what} is empty")
        if len(text) > self._context_tokens * self._token_chars:
            raise QuestionError(
                f"{what} is far longer than the model's {self._context_tokens} tokens"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise QuestionError(f"{what} is not valid Unicode text") from None

    def build(
        self, request: GenerationRequest, images: int, views: int = 1, *, picture: int = 0
    ) -> Prompt:
        """Build the prompt of a checked question.

        Without places, all pictures stand where the template has `<image>`, the local view last.
        With places, each global view stands at its places, and the local view directly after the
        last place of its global view.

        Args:
            request: its places are those of the global views. Without a limit, no room is kept
                for an answer.
            images: number of different pictures, the local view included.
            views: how many of them are global views.
            picture: index of the global view that the local view was cut from; used only with
                places.

        Raises:
            QuestionError: there is no room for an answer of `max_new_tokens` tokens.
        """
        visual = self._visual_tokens
        places = _run_places(images, request.places, views, picture)
        short_ids = self._encode(request, places)
        self._check_length(len(short_ids), len(places), request.max_new_tokens or 0)
        ids: list[int] = []
        starts: list[int] = []
        for token in short_ids:
            if token == self._image_token_id:
                starts.append(len(ids))
            ids += [token] * (visual if token == self._image_token_id else 1)
        assert len(starts) == len(places), "the question was not checked"
        runs = tuple(range(start, start + visual) for start in starts)
        order = tuple(place.picture for place in places) if request.places else ()
        return Prompt(tuple(ids), runs, views, order)

    def shared(self, views: int = 1) -> Prompt:
        """Return the part that all questions share: up to the end of the global views."""
        # Any question will do: image tokens are atomic, so text after them cannot change the ids
        # before.
        prompt = self.build(GenerationRequest("?"), views, views)
        return Prompt(prompt.ids[: prompt.shared], prompt.images, views)

    def _encode(self, request: GenerationRequest, places: Sequence[Place]) -> list[int]:
        """Return ids with one image token for each picture; tokenising hundreds would be slow.

        Image tokens are atomic: their number cannot change the ids around them.
        """
        opening = sum(_opens(place) for place in places)
        rest = self._conversation(request, places)
        return self._plain.encode(f"{self._before}{self._picture * opening}{rest}")

    def _conversation(self, request: GenerationRequest, places: Sequence[Place]) -> str:
        """Return the text after the pictures at the beginning."""
        # Without pictures, the line break after them is left out too.
        middle = self._middle if any(map(_opens, places)) else self._middle.lstrip()
        inside = [place for place in places if not _opens(place)]
        texts = [*(question for question, _ in request.history), request.question]
        questions = [
            self._with_pictures(text, places_in_turn(inside, turn))
            for turn, text in enumerate(texts)
        ]
        text = f"{middle}{questions[0]}{self._after}"
        for (_, answer), question in zip(request.history, questions[1:], strict=True):
            assert self._turn is not None, "checked before"
            head, _, rest = self._turn.partition(ANSWER_SLOT)
            between, _, tail = rest.partition(QUESTION_SLOT)
            text += f"{head}{answer}{between}{question}{tail}"
        return text

    def _with_pictures(self, text: str, places: TurnPlaces) -> str:
        """Return a question's text with its pictures in it."""
        parts = split_at_pictures(text, places)
        opening = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
        words = [part if isinstance(part, str) else self._picture for part in parts]
        gap = self._gap if opening and words[opening:] else ""
        return "".join((*words[:opening], gap, *words[opening:]))

    def _count_reserved(self, ids: list[int]) -> int:
        return sum(token in self._reserved_ids for token in ids)

    def _check_length(self, length: int, images: int, max_new_tokens: int) -> None:
        """Refuse a prompt that does not fit the context; `length` counts one id per picture."""
        prompt = length + images * (self._visual_tokens - 1)
        if prompt + max_new_tokens > self._context_tokens:
            raise QuestionError(
                f"the question is too long: {prompt} tokens with {images} picture(s) and "
                f"{max_new_tokens} for the answer exceed the model's {self._context_tokens}"
            )


def _run_places(images: int, places: Places, views: int, picture: int) -> Places:
    """Return the place of each run of visual tokens; picture index `views` is the local view."""
    if not places:
        return tuple(Place(0, 0, number) for number in range(images))
    last = max(i for i, place in enumerate(places) if place.picture == picture)
    local = (places[last]._replace(picture=views),) * (images - views)
    return (*places[: last + 1], *local, *places[last + 1 :])


def _opens(place: Place) -> bool:
    """Whether a picture stands before all text."""
    return place.turn == place.position == 0
