"""The Transformers backend."""
