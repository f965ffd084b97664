"""Stored conversations that later requests can continue, within bounds."""

from __future__ import annotations

from collections import OrderedDict

from vlm_collab.openai import ApiError, Conversation, refuse


class ConversationStore:
    """Conversations by the id of their last response; the least recently used are dropped first.

    Each belongs to a camera: another camera's rules might let more of its pictures leave.

    Args:
        max_count: most responses.
        max_bytes: most bytes of their pictures and texts; shared ones count once.
        max_answers, max_answer_bytes: bounds on the texts of answers, which are kept for longer: a
            client that refers to one sends the pictures itself.
    """

    def __init__(
        self, max_count: int, max_bytes: int, *, max_answers: int, max_answer_bytes: int
    ) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._max_answer_bytes = max_answer_bytes
        self._kept: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._answers: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._answer_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, camera: str, name: str, conversation: Conversation, answer: str) -> None:
        """Store a conversation with its last answer, and the answer by itself."""
        self._answers[camera, name] = answer
        self._answer_bytes += len(answer.encode())
        while len(self._answers) > self._max_answers or self._answer_bytes > self._max_answer_bytes:
            self._drop_answer(*next(iter(self._answers)))
        self._kept[camera, name] = conversation
        while len(self._kept) > self._max_count or self._nbytes() > self._max_bytes:
            self._kept.popitem(last=False)

    def get(self, camera: str, name: str | None) -> Conversation:
        """Look up a conversation; the empty one for no id.

        Raises:
            ApiError: it was never stored, or it was dropped.
        """
        if name is None:
            return Conversation()
        if (camera, name) not in self._kept:
            raise _unknown(name, "previous_response_id")
        self._kept.move_to_end((camera, name))
        return self._kept[camera, name]

    def answer(self, camera: str, name: str) -> str | None:
        """The text of a response; None if it is not stored."""
        if (camera, name) not in self._answers:
            return None
        self._answers.move_to_end((camera, name))
        return self._answers[camera, name]

    def forget(self, camera: str, name: str) -> None:
        """Delete a response.

        Raises:
            ApiError: it was never stored, or it was dropped (404).
        """
        dropped = self._drop_answer(camera, name)
        if self._kept.pop((camera, name), None) is None and not dropped:
            raise _unknown(name, "response_id", status=404)

    def _drop_answer(self, camera: str, name: str) -> bool:
        answer = self._answers.pop((camera, name), None)
        self._answer_bytes -= len((answer or "").encode())
        return answer is not None

    def _nbytes(self) -> int:
        """Bytes in memory: responses that continue each other share the same objects."""
        sizes: dict[int, int] = {}
        for conversation in self._kept.values():
            for _, text in conversation.lines:
                sizes[id(text)] = len(text)
            for picture in conversation.pictures:
                if isinstance(picture, bytes):
                    sizes[id(picture)] = len(picture)
        return sum(sizes.values())


def _unknown(name: str, param: str, *, status: int = 400) -> ApiError:
    text = f"there is no response {name!r}; it was never stored, or it was dropped"
    return refuse(param, text, "previous_response_not_found", status=status)
