"""The verbs of the command line, one per module, each with `run(config)`."""
