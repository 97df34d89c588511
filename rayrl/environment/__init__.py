"""What an environment's author writes: tasks, the coroutine that plays one, and its rewards."""
