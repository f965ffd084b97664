"""What is known of models without loading them: presets and calibration files."""
