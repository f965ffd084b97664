"""Benchmarks: samples, prompts and scorers."""
