"""Replicas behind Ray Serve, and how env workers and HTTP clients reach them."""
