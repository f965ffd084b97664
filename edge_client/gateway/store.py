"""Responses that later ones may go on from, within bounds."""

from __future__ import annotations

from collections import OrderedDict

from vlm_collab.openai import ApiError, Conversation, refuse


class ResponseStore:
    """Conversations by the id of the response that ended them; the oldest go first.

    Each belongs to a camera: under another's rules, more of its pictures might leave.

    Args:
        max_count: most responses.
        max_bytes: most bytes of their pictures and texts; what several share counts once.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, camera: str, name: str, conversation: Conversation) -> None:
        """Keep a conversation, its answer included."""
        self._kept[camera, name] = conversation
        while len(self._kept) > self._max_count or self._nbytes() > self._max_bytes:
            self._kept.popitem(last=False)

    def get(self, camera: str, name: str | None) -> Conversation:
        """A conversation; the empty one for no id.

        Raises:
            ApiError: there is none, or no longer.
        """
        if name is None:
            return Conversation()
        if (camera, name) not in self._kept:
            raise _unknown(name, "previous_response_id")
        self._kept.move_to_end((camera, name))
        return self._kept[camera, name]

    def answer(self, camera: str, name: str) -> str | None:
        """What a response said; None if it is not kept, or no longer."""
        if (camera, name) not in self._kept:
            return None
        return self.get(camera, name).lines[-1][1]

    def forget(self, camera: str, name: str) -> None:
        """Keep a response no longer.

        Raises:
            ApiError: there is none, or no longer (404).
        """
        if self._kept.pop((camera, name), None) is None:
            raise _unknown(name, "response_id", status=404)

    def _nbytes(self) -> int:
        """Pictures and texts are handed on from response to response, so each is one object."""
        held: dict[int, int] = {}
        for conversation in self._kept.values():
            for _, text in conversation.lines:
                held[id(text)] = len(text)
            for picture in conversation.pictures:
                if isinstance(picture, bytes):
                    held[id(picture)] = len(picture)
        return sum(held.values())


def _unknown(name: str, param: str, *, status: int = 400) -> ApiError:
    text = f"there is no response {name!r}, or no longer"
    return refuse(param, text, "previous_response_not_found", status=status)
