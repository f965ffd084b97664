"""The network service: Starlette on uvicorn around the engine.

`config` settings · `app` routes · `connection` one WebSocket · `views` what is kept of pictures ·
`queue` whose turn it is · `metrics` Prometheus · `logs` structured logs · `runner` start and stop.
"""
