"""The network service: Starlette on uvicorn around the engine.

- `config`: settings and limits.
- `state`: what all clients share; made of `queue` (turns at the model), `view_store` (views kept
  for follow-up questions) and `metrics` (Prometheus).
- `answering`: the work on a question, however it came in.
- `connection`: one WebSocket, with `connection_question`, `connection_views` and
  `connection_output`.
- `openai`: OpenAI's APIs over HTTP.
- `asgi`: the application, with its routes and its shutdown; `page`: the browser page's routes.
- `runner`: starts and stops a server; `logs`: structured logs.

Imports go from the end of this list to its beginning.
"""
