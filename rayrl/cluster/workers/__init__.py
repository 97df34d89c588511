"""Env workers: the actors that play episodes, and the driver's pool of them."""
