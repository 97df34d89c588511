"""RLlib's policies as players, and rayrl's environments for RLlib to train on.

Apart from `rayrl/cluster` because nothing here runs on Ray: it imports RLlib as a library, which
takes seconds and is an extra, and only where a setting or a program names it.
"""
