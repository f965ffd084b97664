"""Evaluation: benchmarks, runs, analysis, reports, speed measurements, and the demo models."""
