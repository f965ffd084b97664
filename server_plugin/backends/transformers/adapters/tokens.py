"""Token ids of a prompt in which nobody's text can spell a special token.

A tokenizer looks for its special tokens (`<image>`, `</s>`, `<|im_start|>`) anywhere in a text,
so a question that quotes one would forge it. Here a copy of the tokenizer knows them under
spellings that are drawn at random and never leave this process. Templates are written with
those; texts of users cannot be. The copy works on the whole prompt at once, so an ordinary
question gets exactly the ids that the checkpoint's own tokenizer gives it: no text is cut, and
no word is joined or split otherwise.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from vlm_collab.errors import ModelError


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str) -> list[int]: ...


class PlainText:
    """Tokenises templates with their special tokens, and all other text as plain text.

    Args:
        tokenizer: of the checkpoint; one of the Rust library `tokenizers`.

    Raises:
        ModelError: it is a tokenizer of another kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(core, Core):
            raise ModelError(
                f"the checkpoint's tokenizer is a {type(tokenizer).__name__}, which cannot tell "
                "special tokens from text; it needs one with a tokenizer.json"
            )
        described = json.loads(core.to_str())
        described["added_tokens"] = []
        self._core = Core.from_str(json.dumps(described))
        self._core.no_truncation()
        self._core.no_padding()
        added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if str(token)}
        # Drawn anew, so no text that was written before can hold it, and none can find it out.
        secret = secrets.token_hex(16)
        self._spellings = {str(token): f"<{secret}.{id}>" for id, token in added.items()}
        self._core.add_tokens(
            [
                AddedToken(
                    self._spellings[str(token)],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in added.values()
            ]
        )
        self._ids = {
            self._core.token_to_id(self._spellings[str(token)]): id for id, token in added.items()
        }
        # The longest of several that begin at one place, as the tokenizer itself takes it.
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if added else None

    def template(self, text: str) -> str:
        """A template's text for `encode`, with its special tokens as such."""
        if self._special is None:
            return text
        return self._special.sub(lambda found: self._spellings[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Token ids, with those that the tokenizer puts before and after every text.

        Args:
            text: parts that came through `template`, and texts of users as they are.
        """
        encoded = self._core.encode(text)
        # What the tokenizer puts around a text has its own ids already.
        return [
            id if around else self._ids.get(id, id)
            for id, around in zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        ]
