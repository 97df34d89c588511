"""Evaluation statistics, result tables and the HTML report."""
