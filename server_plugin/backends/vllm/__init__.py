"""The vLLM backend. Importing this package needs no vLLM; see docs/vllm.md."""
