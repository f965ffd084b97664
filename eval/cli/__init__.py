"""The commands `vlm-collab eval`, `vlm-collab calibrate` and `vlm-collab demo`."""
