"""How long a test waits for what has to happen."""

PATIENCE_S = 120.0
"""Only what hangs takes so long; a busy machine takes ten times as long as a quiet one."""
