"""The folder of a run: metrics, checkpoints and alarms, and what a run needs to start and resume."""
