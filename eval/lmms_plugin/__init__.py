"""The two-stage method as a model of lmms-eval (`docs/lmms-eval.md`)."""
