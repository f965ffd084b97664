"""Runs: answer the samples of a benchmark, and write a row for each."""
