"""Analysis of runs: numbers computed from their rows, without a model."""
