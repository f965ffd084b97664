"""The demo model: a few-million-parameter LLaVA trained from scratch on generated scenes."""
