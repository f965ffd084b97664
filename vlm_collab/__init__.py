"""Core of vlm-collab, shared by the edge and the server.

- `errors`: every error of the project. `geometry`: rectangles, views and token grids.
- `method`: uncertainty, retransmission policies, region search, costs.
- `pictures`: headers of encoded pictures, decoding, encoding, views and regions.
- `protocol`: messages and state machines of `vlm-collab/1`, without I/O.
- `openai`: OpenAI's Chat Completions and Responses APIs, as bytes in and bytes out.
- `web`: HTTP that the gateway and the service share. `page`: the browser page.
- `cli`: what the command lines share.

`import vlm_collab` needs neither torch nor numpy. `method.uncertainty` and `method.roi` compute on
arrays; they need numpy and are imported by name.
"""

from __future__ import annotations

__version__ = "0.2.0"
