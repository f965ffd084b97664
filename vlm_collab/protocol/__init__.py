"""The protocol `vlm-collab/1`: messages, and both ends as sans-I/O state machines."""
