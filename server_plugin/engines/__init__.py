"""Engines: what is done with a question, whatever runtime holds the model."""
