"""Rows become updates: a plain torch learner, and DeepSpeed's ranks that must equal it."""
