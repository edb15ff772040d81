"""Checkpoints: where they come from, what is in them, how their model is built."""
