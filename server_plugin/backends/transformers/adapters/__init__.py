"""One file per model family: what differs between models, and nothing else."""
