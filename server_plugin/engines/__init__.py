"""Engines: how a question is answered, independent of the model runtime."""
