"""What the raylet runs for a worker process: ask the fork server for one, or become one.

A script on the standard library alone, so that it takes 20 ms. Where the fork server cannot serve,
Ray's own script for this (`setup_worker.py`) takes its place: the server is gone, or the worker's
runtime_env wants variables from its start on, another Python or a container.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from contextlib import suppress


def fork(arguments: list[str]) -> bool:
    """Have the server fork a worker with this process's environment, group and files."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "process_group": os.getpgrp(),  # Ray ends what a worker leaves behind by its group
        "oom_score": oom_score,
    }
    files = array.array("i", [0, 1, 2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(os.environ["RAYRL_FORK_SERVER"])
        server.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        server.sendall(json.dumps(request).encode() + b"\n")
        return server.recv(1) == b"\0"


def is_plain(arguments: list[str]) -> bool:
    """Whether the worker's runtime_env is empty."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
            python = context.pop("py_executable", sys.executable)
            return python == sys.executable and not any(context.values())
    return True


if __name__ == "__main__":
    forked = False
    if is_plain(sys.argv[1:]):
        with suppress(OSError):
            forked = fork(sys.argv[1:])
    if not forked:
        worker = next(argument for argument in sys.argv[1:] if argument.endswith(".py"))
        setup = os.path.join(os.path.dirname(worker), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, setup, *sys.argv[1:]])
