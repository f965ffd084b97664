"""What the two-stage protocol is held against, each behind one small interface."""
