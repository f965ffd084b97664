"""Commands that need the `server` extra."""
