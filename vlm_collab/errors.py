"""Every error of the project, in one hierarchy.

::

    CollabError                     one clear line for a person; never a traceback
    ├── ConfigError                 a setting, option or preset is wrong
    ├── ImageError                  a picture cannot be used
    │   ├── UnsupportedImageError   not a picture, or not in a format both sides agreed on
    │   └── ImageTooLargeError      more pixels, frames or bytes than the limit
    ├── QuestionError               a question is empty, too long, or not a text
    ├── ModelError                  a checkpoint is missing, broken or of an unknown family
    ├── ProtocolError               the order or content of messages is wrong
    │   ├── LocalProtocolError      this side tried to do what the protocol forbids
    │   └── RemoteProtocolError     the peer did
    ├── LinkError                   no connection, or it was lost for good
    ├── DeadlineError               no answer before the caller's deadline
    ├── PrivacyError                the privacy policy keeps the picture on the device
    ├── AuthenticationError         the server does not accept the token, or the origin
    └── ServerError                 the server refused a question; carries the wire error code
        ├── BusyError               its queue is full; `retry_after_s` says when to ask again
        └── ViewGoneError           it no longer has the view; the edge sends it again by itself

`vlm_collab.openai.ApiError` is a `CollabError` too. Programming errors (`TypeError` or `ValueError`
of a wrong call) are not part of the hierarchy and are not caught.
"""

from __future__ import annotations

import enum


class ErrorCode(enum.IntEnum):
    """The closed list of reasons in an `Error` message. The numbers are the wire values.

    A code never changes its number or meaning; new ones are added at the end.
    """

    BAD_FRAME = 1
    """The frame is not a message of this protocol."""
    BAD_ORDER = 2
    """The message is not allowed now (`Ask` before `Hello`, a question id used twice)."""
    UNSUPPORTED_VERSION = 3
    """The peer speaks another version of the protocol."""
    BAD_IMAGE = 4
    """The picture cannot be decoded, or its format was not agreed on."""
    TOO_LARGE = 5
    """A frame, picture, question or budget is over a limit that `Welcome` stated."""
    BAD_QUESTION = 6
    """The question is empty or not a text, or the model cannot take it."""
    VIEW_GONE = 7
    """The server no longer has the view that the question refers to; send it again."""
    BUSY = 8
    """The queue is full; try again after `retry_after_ms`."""
    CANCELLED = 9
    """The edge cancelled the question."""
    SHUTTING_DOWN = 10
    """The server is shutting down and takes no more questions."""
    DEADLINE = 11
    """The server could not answer within its own time limit."""
    BAD_OPTION = 12
    """An option has a value that this server or model does not support."""
    INTERNAL = 13
    """The server failed; see its log."""


class CollabError(Exception):
    """Base of all errors that a user of this project may meet. `str()` is one clear line."""


class ConfigError(CollabError):
    """A setting, option or preset is wrong."""


class ImageError(CollabError):
    """A picture cannot be used."""


class UnsupportedImageError(ImageError):
    """Not a picture, or not in a format that both sides agreed on."""


class ImageTooLargeError(ImageError):
    """More pixels, frames or bytes than the limit allows."""


class QuestionError(CollabError):
    """A question is empty, too long, or not a text."""


class ModelError(CollabError):
    """A checkpoint is missing, broken or of a family without an adapter."""


class ProtocolError(CollabError):
    """A message breaks the protocol.

    Args:
        message: one line for a person.
        code: the wire code that tells the peer.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.BAD_ORDER) -> None:
        super().__init__(message)
        self.code = code


class LocalProtocolError(ProtocolError):
    """This side tried to break the protocol. A bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent a frame that is not a message, or a message that is not allowed now."""


class LinkError(CollabError):
    """No connection to the server, or it was lost and did not come back."""


class DeadlineError(CollabError):
    """No answer before the caller's deadline."""


class PrivacyError(CollabError):
    """The privacy policy does not let the picture leave the device (see `docs/privacy.md`)."""


class AuthenticationError(CollabError):
    """The server does not accept the token or the origin."""


class ServerError(CollabError):
    """The server refused a question.

    Args:
        message: the server's own line.
        code: the reason from the closed list.
        retry_after_s: when to ask again, in seconds; None if that cannot help.
    """

    def __init__(self, message: str, code: ErrorCode, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class BusyError(ServerError):
    """The server's queue is full; ask again after `retry_after_s`."""


class ViewGoneError(ServerError):
    """The server no longer has the view that a follow-up question refers to."""


def server_error(code: ErrorCode, message: str, retry_after_s: float | None) -> ServerError:
    """Build the exception that fits a wire error."""
    kind = {ErrorCode.BUSY: BusyError, ErrorCode.VIEW_GONE: ViewGoneError}.get(code, ServerError)
    return kind(message, code, retry_after_s)
