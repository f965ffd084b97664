"""Settings chosen on data."""
