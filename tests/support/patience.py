"""Longest time that a test waits for an event."""

PATIENCE_S = 120.0
"""Much longer than needed: a busy machine can take ten times as long as an idle one."""
