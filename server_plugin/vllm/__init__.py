"""The vLLM backend and its plugin. Importing this package needs no vLLM; see docs/vllm.md."""
