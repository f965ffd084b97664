"""The OpenAI-compatible endpoint, for clients that know nothing of the two stages."""
