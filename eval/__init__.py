"""Generated benchmark, training of the demo models, harness and figures."""
