"""Figures computed from the rows of runs. Nothing here needs a model."""
