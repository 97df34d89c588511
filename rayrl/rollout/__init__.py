"""Task -> Episode -> Group: agents, players, and the one loop that plays episodes."""
