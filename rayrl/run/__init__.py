"""The folder of a run, and its metrics, checkpoints and alarms."""
