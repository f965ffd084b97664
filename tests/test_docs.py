"""Pages that are generated from the code say what the code says."""

from __future__ import annotations

import typing

from tests.support.protocol_page import PAGE, page
from vlm_collab.errors import ErrorCode
from vlm_collab.protocol import messages
from vlm_collab.protocol.table import TRANSITIONS


def test_the_protocol_page_is_the_code_s():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run `python -m tests.support.protocol_page`"


def test_the_protocol_page_names_every_message_move_and_error():
    text = PAGE.read_text(encoding="utf-8")
    for union in (messages.UpMessage, messages.DownMessage):
        for kind in typing.get_args(union):
            assert f"`{kind.__name__}`" in text
    for code in ErrorCode:
        assert f"| {code.value} | `{code.name}` |" in text
    assert text.count(" --> ") == len(TRANSITIONS)
