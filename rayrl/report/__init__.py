"""Statistics of episodes, tables and pages: what a run is read by."""
