"""What runs in the sandbox's own process, by the standard library alone.

`supervisor` is its main program: it makes the namespaces (`namespaces`), or does without, gives up
its rights, and runs one program after another (`execution`) under limits and a filter of system
calls (`seccomp`). It imports nothing of rayrl.
"""
