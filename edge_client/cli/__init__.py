"""The `vlm-collab` command and the commands that run on the device."""
