"""Define environments: tasks, the coroutine that plays them, and rewards."""
