"""Prompts as token ids, with the places of their pictures.

The whole prompt is tokenised in one piece, its pictures written as runs of the image token, so
the ids are those that the checkpoint's own processor gives. It is split afterwards, at the runs.
Special tokens are those of the template and its pictures; a user's text that quotes one holds
plain text (`server_plugin.adapters.tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass

from server_plugin.adapters.tokens import PlainText, Tokenizer
from server_plugin.backend import History
from server_plugin.presets import ANSWER_SLOT, IMAGE_SLOT, QUESTION_SLOT
from vlm_collab.errors import QuestionError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        ids: all token ids, image tokens included.
        images: where the visual tokens of each picture lie, in order, global views first.
        views: how many global views there are.
    """

    ids: tuple[int, ...]
    images: tuple[range, ...]
    views: int = 1

    @property
    def shared(self) -> int:
        """Length of the part up to the end of the global views, the same for every question."""
        return self.images[self.views - 1].stop if self.views else 0


class PromptBuilder:
    """Fills a template with questions.

    Args:
        tokenizer: of the checkpoint.
        template: with one `<image>` before one `{question}`.
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
        # A character outside the vocabulary may be spelled as the unknown token, which some
        # tokenizers do not tell from the end of the text.
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._reserved_ids = set(tokenizer.added_tokens_decoder) - ({tokenizer.unk_token_id} - ends)
        self._own_reserved: dict[tuple[int, int], int] = {}
        # A token spells at most this many characters, so a text much longer than the context
        # is refused before it is tokenised.
        self._token_chars = max(len(token) for token in tokenizer.get_vocab())

    def check(self, question: str, images: int, max_new_tokens: int, history: History = ()) -> None:
        """Refuse a question that no prompt can be made of.

        Raises:
            QuestionError: it or what was said before is empty, is no proper text, or leaves no
                room for `images` pictures and `max_new_tokens` tokens of answer; or the template
                takes no conversations.
        """
        if history and self._turn is None:
            raise QuestionError("this model's prompt template takes single questions only")
        for asked, answered in history:
            self._check_text(asked, "an earlier question")
            self._check_text(answered, "an earlier answer", may_be_empty=True)
        self._check_text(question, "the question")
        ids = self._encode(question, images, history)
        # A tokenizer may find a reserved token by its ordinary rules, too. None that is known
        # here does.
        key = images, len(history)
        if key not in self._own_reserved:
            plain = self._encode("?", images, (("?", "?"),) * len(history))
            self._own_reserved[key] = self._count_reserved(plain)
        if self._count_reserved(ids) != self._own_reserved[key]:
            raise QuestionError("the question spells a token that this model reserves")
        self._check_length(len(ids), images, max_new_tokens)

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
    ) -> Prompt:
        """The prompt of a checked question over `images` pictures.

        All pictures stand where the template has them, before the first question, whichever
        question they came with.

        Args:
            question: the user's text.
            images: pictures in all.
            max_new_tokens: longest answer.
            history: what was asked and answered before.
            views: how many of the pictures are global views.

        Raises:
            QuestionError: it leaves no room for `max_new_tokens` tokens of answer.
        """
        visual = self._visual_tokens
        written = self._encode(question, images, history)
        self._check_length(len(written), images, max_new_tokens)
        ids: list[int] = []
        starts: list[int] = []
        for token in written:
            if token == self._image_token_id:
                starts.append(len(ids))
            ids += [token] * (visual if token == self._image_token_id else 1)
        assert len(starts) == images, "the question was not checked"
        places = tuple(range(start, start + visual) for start in starts)
        return Prompt(tuple(ids), places, views)

    def shared(self, views: int = 1) -> Prompt:
        """The part that all questions share: everything up to the end of the global views."""
        # Any question does: the image tokens are atomic, so what follows them cannot change
        # the ids before.
        prompt = self.build("?", views, 0, views=views)
        return Prompt(prompt.ids[: prompt.shared], prompt.images, views)

    def _encode(self, question: str, images: int, history: History = ()) -> list[int]:
        """Ids with one image token for each picture, which tokenizers take hundreds of slowly.

        They are atomic: how many follow each other cannot change what is around them.
        """
        said = self._conversation(question, images, history)
        return self._plain.encode(f"{self._before}{self._picture * images}{said}")

    def _conversation(self, question: str, images: int, history: History) -> str:
        """What follows the pictures."""
        # Without pictures, the line break behind them goes too.
        middle = self._middle if images else self._middle.lstrip()
        questions = [*(asked for asked, _ in history), question]
        text = f"{middle}{questions[0]}{self._after}"
        for (_, answered), asked in zip(history, questions[1:], strict=True):
            assert self._turn is not None, "checked before"
            head, _, rest = self._turn.partition(ANSWER_SLOT)
            between, _, tail = rest.partition(QUESTION_SLOT)
            text += f"{head}{answered}{between}{asked}{tail}"
        return text

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
