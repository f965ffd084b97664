"""Recorded conversations that every edge must reproduce, in any programming language.

A transcript is a list of steps of one `EdgeSession`: a call and the frames that it sent, or a
received frame and its event. The records never change: a future edge must still understand the
servers of today. `python -m tests.support.transcripts` writes missing ones.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vlm_collab.errors import ErrorCode, RemoteProtocolError
from vlm_collab.geometry import Size
from vlm_collab.pictures.images import Codec
from vlm_collab.protocol.edge_session import EdgeSession
from vlm_collab.protocol.encoding import encode
from vlm_collab.protocol.messages import (
    Answer,
    AnyMessage,
    DeclineReason,
    Error,
    Fallback,
    Options,
    Partial,
    RegionRequest,
    Stage,
    Turn,
    Usage,
    Welcome,
)

FOLDER = Path(__file__).resolve().parents[1] / "vlm_collab" / "transcripts"
SOURCE = Size(1000, 700)

Step = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as JSON has it: structs as objects, bytes in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def event_of(event: Any) -> Any:
    """What `receive` returned, as JSON."""
    if event is None:
        return None
    described = {"kind": type(event).__name__, **plain(event)}
    described.pop("target", None)  # the request has it
    return described


def act(session: EdgeSession, name: str, arguments: dict[str, Any]) -> None:
    """Do one step of a transcript."""
    match name:
        case "hello":
            codecs = tuple(Codec(codec) for codec in arguments["codecs"])
            resume = bytes.fromhex(arguments["resume"])
            session.hello(codecs, resume=resume, client=arguments["client"])
        case "ask":
            view = arguments["view"]
            session.ask(
                arguments["question"],
                arguments["view_id"],
                Size(*arguments["source"]),
                None if view is None else bytes.fromhex(view),
                None if arguments["options"] is None else Options(**arguments["options"]),
                history=tuple(Turn(*turn) for turn in arguments["history"]),
            )
        case "send_region":
            session.send_region(arguments["id"], bytes.fromhex(arguments["image"]))
        case "decline":
            session.decline(arguments["id"], DeclineReason(arguments["reason"]))
        case "cancel":
            session.cancel(arguments["id"])
        case _:
            raise AssertionError(name)


def replay(steps: list[Step]) -> list[Step]:
    """Return a transcript's steps with the results of this package's own edge."""
    session = EdgeSession()
    done: list[Step] = []
    for step in steps:
        result = dict(step)
        if "do" in step:
            act(session, step["do"], step["with"])
        else:
            try:
                result["event"] = event_of(session.receive(bytes.fromhex(step["receive"])))
            except RemoteProtocolError:
                result["event"] = "refused"
        result["frames"] = [frame.hex() for frame in session.data_to_send()]
        done.append(result)
    return done


# ---- what is recorded ------------------------------------------------------------------------

WELCOME = Welcome(b"session-", "model", 336, 336, 2, 24, 24, (Codec.JPEG,), 2**21, 8192, 4)
HELLO: Step = {"do": "hello", "with": {"codecs": [1, 3, 2], "resume": "", "client": "page"}}


def _ask(question: str = "what?", view: str | None = "ffd8ff", **more: Any) -> Step:
    options = {"stream": True, "want_map": True}
    given = {"view_id": 7, "source": list(SOURCE), "options": options, "history": [], **more}
    return {"do": "ask", "with": {"question": question, "view": view, **given}}


def _came(message: AnyMessage) -> Step:
    """A frame from the server."""
    return {"receive": encode(message).hex()}


def _request(id: int, side_px: int = 224, **more: Any) -> RegionRequest:
    fields = {"index": 30, "columns": 9, "rows": 9, "deadline_ms": 10000, **more}
    return RegionRequest(
        id=id,
        first="a cat …",
        uncertainty_micro=1_234_567,
        side_px=side_px,
        target_width=336,
        target_height=336,
        codec=Codec.JPEG,
        quality=90,
        **fields,
    )


def _wanting(view_width: int, view_height: int) -> Welcome:
    return msgspec.structs.replace(WELCOME, view_width=view_width, view_height=view_height)


def _conversations() -> dict[str, Callable[[], list[Step]]]:
    open_ = [HELLO, _came(WELCOME)]
    usage = Usage(70_000, 300, 700, 12, 123_456_789_012, 1, 65535, 20, 40)
    sure = Answer(1, "a dog", Stage.FIRST, Fallback.NONE, 40_000, usage)
    refined = Answer(1, "zwei 🐕🐕", Stage.SECOND, Fallback.NONE, 2**32 - 1, usage)
    busy = Error(2, ErrorCode.BUSY, "the server is busy", 1500)
    region = {"do": "send_region", "with": {"id": 1, "image": "00" * 300}}
    return {
        "sure": lambda: [*open_, _ask(), _came(sure), _ask("and now?", None), _came(busy)],
        "refined": lambda: [
            *open_,
            _ask("wie viele 🐕?"),
            _came(Partial(1, Stage.FIRST, 0, "ein 🐕🐈")),
            _came(Partial(1, Stage.FIRST, 5, "🐕 da")),
            _came(_request(1, map=bytes(range(256)) + bytes(320))),
            region,
            _came(Partial(1, Stage.SECOND, 0, "zwei ")),
            _came(Partial(1, Stage.SECOND, 5, "🐕🐕")),
            _came(refined),
        ],
        "declined": lambda: [
            *open_,
            _ask(),
            _came(_request(1, side_px=225)),
            _came(Answer(1, "a cat", Stage.FIRST, Fallback.DECLINED, 1_234_567, Usage())),
            _ask(options=None),
            _came(_request(2, index=24 * 24 - 1, columns=1, rows=1)),
            {"do": "decline", "with": {"id": 2, "reason": int(DeclineReason.PRIVACY)}},
            _came(Answer(2, "a cat", Stage.FIRST, Fallback.DECLINED, 1_234_567, Usage())),
        ],
        "cancelled": lambda: [
            *open_,
            _ask(),
            {"do": "cancel", "with": {"id": 1}},
            _came(Partial(1, Stage.FIRST, 0, "crossed")),
            _came(_request(1)),
            _came(Error(1, ErrorCode.CANCELLED, "cancelled")),
        ],
        "resumed": lambda: [
            {"do": "hello", "with": {"codecs": [1], "resume": b"session-".hex(), "client": ""}},
            _came(WELCOME),
            _ask(view=None),
            _came(Error(1, ErrorCode.VIEW_GONE, "gone", 0)),
            _ask(view="89504e47"),
            _came(Error(0, ErrorCode.SHUTTING_DOWN, "going away", 1000)),
        ],
        "conversation": lambda: [
            *open_,
            _ask("und jetzt?", None, history=[["was ist das?", "ein 🐕"], ["welche Farbe?", ""]]),
            _came(sure),
        ],
        "another-picture": lambda: [*open_, _ask(), _came(_request(1, picture=1))],
        "too-much-kept": lambda: [*open_, _ask(), _came(Partial(1, Stage.FIRST, 1, "x"))],
        "never-asked": lambda: [*open_, _came(sure)],
        "view-at-the-limit": lambda: [HELLO, _came(_wanting(2**19, 2)), _ask()],
        "view-over-the-limit": lambda: [HELLO, _came(_wanting(1025, 1024))],
        "welcomed-twice": lambda: [*open_, _came(WELCOME)],
        "region-wanted-twice": lambda: [*open_, _ask(), _came(_request(1)), _came(_request(1))],
        "answered-twice": lambda: [*open_, _ask(), _came(sure), _came(sure)],
        "no-message": lambda: [*open_, {"receive": "c1"}],
        "no-msgpack-end": lambda: [*open_, {"receive": "9411"}],
        "own-direction": lambda: [*open_, {"receive": replay([HELLO])[0]["frames"][0]}],
        "too-short": lambda: [*open_, {"receive": "9211"}],
        "wrong-type": lambda: [*open_, _ask(), {"receive": "951101013001"}],
    }


def stored() -> dict[str, list[Step]]:
    """The recorded transcripts by name."""
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(FOLDER.glob("*.json"))
    }


def main() -> None:
    """Record the transcripts that do not exist yet."""
    FOLDER.mkdir(exist_ok=True)
    for name, made in _conversations().items():
        file = FOLDER / f"{name}.json"
        if not file.exists():
            steps = replay(made())
            lines = ",\n".join(json.dumps(step, ensure_ascii=False) for step in steps)
            file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
