"""From a checkpoint and a benchmark to per-sample records, and from these to every figure."""
