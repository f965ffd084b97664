"""Settings of models, readable without loading a model: presets and calibration files."""
