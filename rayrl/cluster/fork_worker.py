"""What Ray runs for a Python process of its own: ask the fork server for one, or become one.

A script on the standard library alone, so that it takes 20 ms. Where the fork server cannot serve,
Ray's own script takes its place: the server is gone, or a worker's runtime_env wants variables from
its start on, another Python or a container.

Ray takes this process for the agent or the log monitor (`--agent`) that it has asked for, so it
stays until that ends. A worker tells Ray itself which one it is.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from contextlib import suppress

AGENT = "--agent="  # and the server's socket


def fork(arguments: list[str], socket_path: str, kind: str) -> bool:
    """Have the server fork a process with the environment, group and files of this one."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    request = {
        "kind": kind,
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "process_group": os.getpgrp(),  # Ray ends what a worker leaves behind by its group
        "oom_score": oom_score,
    }
    files = array.array("i", [0, 1, 2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(socket_path)
        server.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        server.sendall(json.dumps(request).encode() + b"\n")
        if server.recv(1) != b"\0":
            return False
        if kind == "agent":
            server.recv(1)  # returns when it has ended
            sys.exit(1)
        return True


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
    arguments = sys.argv[1:]
    forked = False
    with suppress(OSError):
        if arguments[0].startswith(AGENT):
            path = arguments.pop(0).removeprefix(AGENT)
            replaced = ["-u", *arguments]
            forked = fork(arguments, path, "agent")
        else:
            worker = next(argument for argument in arguments if argument.endswith(".py"))
            replaced = [os.path.join(os.path.dirname(worker), "setup_worker.py"), *arguments]
            if is_plain(arguments):
                forked = fork(arguments, os.environ["RAYRL_FORK_SERVER"], "worker")
    if not forked:
        os.execv(sys.executable, [sys.executable, *replaced])
