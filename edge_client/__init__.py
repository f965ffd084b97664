"""The edge client: ask questions about pictures over `vlm-collab/1`, and send only what is needed.

::

    import edge_client

    answer = edge_client.ask("photo.jpg", "What does the small sign say?")
    print(answer.text, answer.bytes_up, "of", answer.original_bytes)

`EdgeClient` is the async client, `Client` is the synchronous one, and `ask` asks one question
without either. Names are imported on first use, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlm_collab import __version__ as __version__

if TYPE_CHECKING:
    from edge_client.answer import EdgeAnswer as EdgeAnswer
    from edge_client.client import EdgeClient as EdgeClient
    from edge_client.picture import Picture as Picture
    from edge_client.sync import Client as Client
    from edge_client.sync import ask as ask
    from vlm_collab.pictures.images import Codec as Codec
    from vlm_collab.protocol.edge_session import EdgeLimits as EdgeLimits
    from vlm_collab.protocol.messages import Fallback as Fallback
    from vlm_collab.protocol.messages import Options as Options
    from vlm_collab.protocol.messages import Retransmit as Retransmit
    from vlm_collab.protocol.messages import Stage as Stage

_HOME = {
    "Client": "edge_client.sync",
    "Codec": "vlm_collab.pictures.images",
    "EdgeAnswer": "edge_client.answer",
    "EdgeClient": "edge_client.client",
    "EdgeLimits": "vlm_collab.protocol.edge_session",
    "Fallback": "vlm_collab.protocol.messages",
    "Options": "vlm_collab.protocol.messages",
    "Picture": "edge_client.picture",
    "Retransmit": "vlm_collab.protocol.messages",
    "Stage": "vlm_collab.protocol.messages",
    "ask": "edge_client.sync",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
