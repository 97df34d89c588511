"""Weights as files and as bytes: model folders, the flat buffer, and its way to the replicas."""
