"""What runs in place of a preloaded program: it has the server fork that, and ends as it does.

`python preload_client.py SOCKET SCRIPT ARGUMENT...`, of which the first is the number of an
inherited socket. On the standard library's quickest parts, because it is started for every episode.
"""

from __future__ import annotations

import array
import marshal
import os
import signal
import socket
import sys

_, number, *words = sys.argv
with socket.socket(fileno=int(number)) as server:
    request = marshal.dumps((words, dict(os.environ), os.getcwd()))
    server.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    server.sendall(len(request).to_bytes(8, "big") + request)
    answer = server.recv(1 << 16).decode()  # when the program has ended
code = int(answer or -signal.SIGKILL)  # nothing: the server was killed
if code < 0:
    if -code != signal.SIGKILL:  # which has no other handler
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
