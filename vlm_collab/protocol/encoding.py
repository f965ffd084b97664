"""Encode and decode the messages of `vlm-collab/1`: one msgpack array for each message."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from vlm_collab.errors import ErrorCode, RemoteProtocolError
from vlm_collab.protocol.messages import Answer, AnyMessage, Ask, DownMessage, UpMessage

_OPTIONS_INDEX = 1 + Ask.__struct_fields__.index("options")  # the tag comes first
_HISTORY_INDEX = 1 + Ask.__struct_fields__.index("history")

_encoder = msgspec.msgpack.Encoder()
_up_decoder: msgspec.msgpack.Decoder[UpMessage] = msgspec.msgpack.Decoder(UpMessage)
_down_decoder: msgspec.msgpack.Decoder[DownMessage] = msgspec.msgpack.Decoder(DownMessage)


def encode(message: AnyMessage) -> bytes:
    """Encode one message as the payload of one binary frame.

    In `Ask` and `Answer`, trailing fields with default values are left out.
    """
    if isinstance(message, Answer):
        return _encoder.encode(_trimmed(message))
    if isinstance(message, Ask):
        fields = _trimmed(message)
        if message.options is not None:
            fields[_OPTIONS_INDEX] = _trimmed(message.options)
        if message.history:
            fields[_HISTORY_INDEX] = [_trimmed(turn) for turn in message.history]
        return _encoder.encode(fields)
    return _encoder.encode(message)


def _trimmed(struct: Struct) -> list[object]:
    """A struct's values as a list, without the trailing default values."""
    kind = type(struct)
    fields, defaults = list(msgspec.structs.astuple(struct)), kind.__struct_defaults__
    required = len(fields) - len(defaults)
    while len(fields) > required and fields[-1] == defaults[len(fields) - 1 - required]:
        fields.pop()
    tag = kind.__struct_config__.tag
    return fields if tag is None else [tag, *fields]


def decode_up(frame: bytes) -> UpMessage:
    """Decode a frame sent by an edge.

    Raises:
        RemoteProtocolError: the bytes are no message of this direction.
    """
    return _decode(_up_decoder, frame)


def decode_down(frame: bytes) -> DownMessage:
    """Decode a frame sent by a server.

    Raises:
        RemoteProtocolError: the bytes are no message of this direction.
    """
    return _decode(_down_decoder, frame)


_M = TypeVar("_M")


def _decode(decoder: msgspec.msgpack.Decoder[_M], frame: bytes) -> _M:
    try:
        return decoder.decode(frame)
    # Malformed msgpack, wrong types, or text that is not UTF-8. Deeply nested arrays make the C
    # decoder raise RecursionError.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise RemoteProtocolError(f"not a message: {line}", ErrorCode.BAD_FRAME) from error


def websocket_bytes(payload_bytes: int, *, masked: bool) -> int:
    """Bytes of one unfragmented WebSocket frame with this payload (RFC 6455, section 5.2).

    Args:
        payload_bytes: length of the message.
        masked: True from client to server (adds the 4-byte masking key).
    """
    length = 0 if payload_bytes < 126 else 2 if payload_bytes < 65536 else 8
    return 2 + length + (4 if masked else 0) + payload_bytes
