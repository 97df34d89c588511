"""Play tasks to episodes and groups: agents, players and the rollout loop."""
