"""Evaluations while a run trains, and the confidence intervals of what they measure."""
