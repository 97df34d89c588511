"""Tic-tac-toe for rayrl."""
