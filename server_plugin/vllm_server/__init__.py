"""Two-stage inference inside vLLM's own server; see docs/vllm.md."""
