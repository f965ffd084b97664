"""Paths of vlm-collab's demo model and demo pictures."""

from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
"""The demo model's checkpoint, in the layout that transformers and vLLM read."""

PICTURES = Path(__file__).resolve().parent / "pictures"
"""Pictures, and `pictures.json` with a question and its answer for each."""
