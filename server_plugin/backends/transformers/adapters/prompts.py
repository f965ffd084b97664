"""Prompts as token ids, with the places of their pictures.

The whole prompt is tokenised in one piece, its pictures written as runs of the image token, so
the ids are those that the checkpoint's own processor gives. It is split afterwards, at the runs.
Special tokens are those of the template and its pictures; a user's text that quotes one holds
plain text (`server_plugin.backends.transformers.adapters.tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server_plugin.backends.base import History
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
        images: where visual tokens lie, in their order in the prompt; without places, each global
            view once and the local view behind them.
        views: how many global views there are.
        shown: of an interleaved prompt, what each of `images` shows: the number of a global view,
            or `views` for the local view. Empty: each once, in order.
    """

    ids: tuple[int, ...]
    images: tuple[range, ...]
    views: int = 1
    shown: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """Length of the part up to the end of the global views, the same for every question that
        is not interleaved with pictures."""
        return self.images[self.views - 1].stop if self.views else 0

    @property
    def order(self) -> tuple[int, ...]:
        """What each of `images` shows."""
        return self.shown or tuple(range(len(self.images)))

    @property
    def looked_at(self) -> range:
        """From the first global view to the end of the last, with what lies between."""
        places = [one for one, shows in self.shows() if shows < self.views]
        return range(places[0].start, places[-1].stop)

    def shows(self) -> list[tuple[range, int]]:
        """Each run of visual tokens, and what it shows."""
        return list(zip(self.images, self.order, strict=True))


class PromptBuilder:
    """Fills a template with questions.

    Args:
        tokenizer: of the checkpoint.
        template: with one `<image>` before one `{question}`. Pictures that have places stand
            there, and only those at the very beginning in the place of `<image>`.
        image_token: how the checkpoint writes the place of a visual token.
        image_token_id: its id.
        around_picture: text that the checkpoint writes before and after each picture's tokens.
        visual_tokens: tokens of one picture.
        context_tokens: longest sequence that the model takes, answer included.
        turn: what follows the template for each further turn of a conversation, with one
            `{answer}` before one `{question}`; None: no conversations.

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
        # What stands between pictures and the text that they open.
        self._gap = self._middle[: len(self._middle) - len(self._middle.lstrip())]
        # A character outside the vocabulary may be spelled as the unknown token, which some
        # tokenizers do not tell from the end of the text.
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._reserved_ids = set(tokenizer.added_tokens_decoder) - ({tokenizer.unk_token_id} - ends)
        self._own_reserved: dict[tuple[int, ...], int] = {}
        # A token spells at most this many characters, so a text much longer than the context
        # is refused before it is tokenised.
        self._token_chars = max(len(token) for token in tokenizer.get_vocab())

    def check(
        self,
        question: str,
        images: int,
        max_new_tokens: int,
        history: History = (),
        places: Places = (),
    ) -> None:
        """Refuse a question that no prompt can be made of.

        Args:
            images: different pictures in all, the local view included where one may come.
            places: see `build`.

        Raises:
            QuestionError: it or what was said before is empty, is no proper text, or leaves no
                room for its pictures and `max_new_tokens` tokens of answer; the template takes no
                conversations; or the places are impossible.
        """
        if history and self._turn is None:
            raise QuestionError("this model's prompt template takes single questions only")
        for asked, answered in history:
            self._check_text(asked, "an earlier question")
            self._check_text(answered, "an earlier answer", may_be_empty=True)
        self._check_text(question, "the question")
        questions = (*(asked for asked, _ in history), question)
        pictures = 1 + max((place.picture for place in places), default=-1)
        fault = places_fault(places, questions, pictures)
        if fault is not None or pictures > images:
            raise QuestionError(fault or f"places of {pictures} pictures, and there are {images}")
        shown = _shown(images, places, pictures, pictures - 1)
        ids = self._encode(question, shown, history)
        # A tokenizer may find a reserved token by its ordinary rules, too. None that is known
        # here does.
        key = len(shown), len(history)
        if key not in self._own_reserved:
            anything = _shown(len(shown), (), 0, 0)
            plain = self._encode("?", anything, (("?", "?"),) * len(history))
            self._own_reserved[key] = self._count_reserved(plain)
        if self._count_reserved(ids) != self._own_reserved[key]:
            raise QuestionError("the question spells a token that this model reserves")
        self._check_length(len(ids), len(shown), max_new_tokens)

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
        self,
        question: str,
        images: int,
        max_new_tokens: int,
        history: History = (),
        views: int = 1,
        *,
        places: Places = (),
        picture: int = 0,
    ) -> Prompt:
        """The prompt of a checked question over `images` pictures.

        Without places, all pictures stand where the template has them, before the first question,
        the local view last. With places, each stands there, and the local view right behind its
        global view; if that stands at several places, behind the last of them.

        Args:
            question: the user's text.
            images: different pictures in all, the local view included.
            max_new_tokens: longest answer.
            history: what was asked and answered before.
            views: how many of the pictures are global views.
            places: where the global views stand in the texts.
            picture: of which global view the local view is; only looked at with places.

        Raises:
            QuestionError: it leaves no room for `max_new_tokens` tokens of answer.
        """
        visual = self._visual_tokens
        shown = _shown(images, places, views, picture)
        written = self._encode(question, shown, history)
        self._check_length(len(written), len(shown), max_new_tokens)
        ids: list[int] = []
        starts: list[int] = []
        for token in written:
            if token == self._image_token_id:
                starts.append(len(ids))
            ids += [token] * (visual if token == self._image_token_id else 1)
        assert len(starts) == len(shown), "the question was not checked"
        runs = tuple(range(start, start + visual) for start in starts)
        order = tuple(place.picture for place in shown) if places else ()
        return Prompt(tuple(ids), runs, views, order)

    def shared(self, views: int = 1) -> Prompt:
        """The part that all questions share: everything up to the end of the global views."""
        # Any question does: the image tokens are atomic, so what follows them cannot change
        # the ids before.
        prompt = self.build("?", views, 0, views=views)
        return Prompt(prompt.ids[: prompt.shared], prompt.images, views)

    def _encode(self, question: str, shown: Sequence[Place], history: History = ()) -> list[int]:
        """Ids with one image token for each picture, which tokenizers take hundreds of slowly.

        They are atomic: how many follow each other cannot change what is around them.
        """
        opening = sum(_opens(place) for place in shown)
        said = self._conversation(question, shown, history)
        return self._plain.encode(f"{self._before}{self._picture * opening}{said}")

    def _conversation(self, question: str, shown: Sequence[Place], history: History) -> str:
        """What follows the pictures that open the conversation."""
        # Without pictures, the line break behind them goes too.
        middle = self._middle if any(map(_opens, shown)) else self._middle.lstrip()
        inside = [place for place in shown if not _opens(place)]
        asked = [*(asked for asked, _ in history), question]
        questions = [self._written(text, places_in_turn(inside, i)) for i, text in enumerate(asked)]
        text = f"{middle}{questions[0]}{self._after}"
        for (_, answered), written in zip(history, questions[1:], strict=True):
            assert self._turn is not None, "checked before"
            head, _, rest = self._turn.partition(ANSWER_SLOT)
            between, _, tail = rest.partition(QUESTION_SLOT)
            text += f"{head}{answered}{between}{written}{tail}"
        return text

    def _written(self, text: str, spots: TurnPlaces) -> str:
        """A question's text with its pictures in it."""
        parts = split_at_pictures(text, spots)
        opening = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
        words = [part if isinstance(part, str) else self._picture for part in parts]
        gap = self._gap if opening and words[opening:] else ""
        return "".join((*words[:opening], gap, *words[opening:]))

    def _count_reserved(self, ids: list[int]) -> int:
        return sum(token in self._reserved_ids for token in ids)

    def _check_length(self, length: int, images: int, max_new_tokens: int) -> None:
        """Refuse so many ids, of which one stands for each picture."""
        prompt = length + images * (self._visual_tokens - 1)
        if prompt + max_new_tokens > self._context_tokens:
            raise QuestionError(
                f"the question is too long: {prompt} tokens with {images} picture(s) and "
                f"{max_new_tokens} for the answer exceed the model's {self._context_tokens}"
            )


def _shown(images: int, places: Places, views: int, picture: int) -> Places:
    """Where each run of visual tokens stands, and what it shows: `views` is the local view."""
    if not places:
        return tuple(Place(0, 0, number) for number in range(images))
    last = max(i for i, place in enumerate(places) if place.picture == picture)
    local = (places[last]._replace(picture=views),) * (images - views)
    return (*places[: last + 1], *local, *places[last + 1 :])


def _opens(place: Place) -> bool:
    """Whether a picture stands before all text."""
    return place.turn == place.position == 0
