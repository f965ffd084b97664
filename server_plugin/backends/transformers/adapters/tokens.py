"""Tokenisation in which a user's text cannot contain special tokens.

A tokenizer recognises its special tokens (`<image>`, `</s>`, `<|im_start|>`) anywhere in a text,
so a question that quotes one would inject it. Here a copy of the tokenizer has random spellings for
them, which never leave this process. Templates use these spellings; users cannot know them. The
copy tokenises the whole prompt at once, so an ordinary question gets exactly the ids that the
checkpoint's own tokenizer gives: no text is cut, and no word is joined or split differently.
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
    """The parts of a transformers tokenizer that are used here."""

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
        tokenizer: the checkpoint's, backed by the Rust library `tokenizers`.

    Raises:
        ModelError: the tokenizer is of another kind.
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
        # Random for each process, so no text can contain it.
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
        # Of several that begin at the same place, the longest matches, as in the tokenizer.
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if added else None

    def template(self, text: str) -> str:
        """Prepare a template's text for `encode`, which then recognises its special tokens."""
        if self._special is None:
            return text
        return self._special.sub(lambda found: self._spellings[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Return token ids, with those that the tokenizer adds before and after every text.

        Args:
            text: parts prepared by `template`, and users' texts unchanged.
        """
        encoded = self._core.encode(text)
        # Tokens that the tokenizer adds around the text already have their own ids.
        return [
            id if around else self._ids.get(id, id)
            for id, around in zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        ]
