"""Runs: samples in, rows out."""
