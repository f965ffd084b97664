"""The OpenAI-compatible endpoint, for clients without this project's protocol."""
