"""The network service: Starlette on uvicorn around the engine.

`config` settings · `app` routes · `connection` one WebSocket · `openai` OpenAI's APIs · `answering`
what both do with a question · `views` what is kept of pictures · `queue` whose turn it is ·
`metrics` Prometheus · `logs` structured logs · `runner` start and stop.
"""
