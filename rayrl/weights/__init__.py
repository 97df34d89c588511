"""Model folders, the flat weight buffer, and the broadcast of weights to replicas."""
