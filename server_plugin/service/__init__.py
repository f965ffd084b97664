"""The network service: Starlette on uvicorn around the engine.

- `config`: settings and limits; `logs`: structured logs; `metrics`: Prometheus.
- `queue`: turns at the model; `view_store`: views kept for follow-up questions.
- `state`: what all clients share.
- `answering`: the work on a question from any client.
- `connection`: one WebSocket, with `connection_question`, `connection_views` and
  `connection_output`.
- `openai`: OpenAI's APIs over HTTP.
- `asgi`: the application, with its routes and its shutdown.
- `runner`: starts and stops a server.

A module imports only from its own line and the lines above it.
"""
