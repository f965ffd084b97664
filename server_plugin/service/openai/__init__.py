"""The OpenAI-compatible endpoint: both stages for clients that know nothing of them."""
