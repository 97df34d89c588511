"""Programs that are forked from a process which has imported their libraries.

Importing an agent library takes a Python program seconds of processor time, in every episode. With
`preload` one process imports it, and each program begins as a copy of that.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rayrl.errors import EnvError
from rayrl.rollout.programs.process import TOKEN, TOKEN_LENGTH

__all__ = ["fork_instead"]

_CLIENT = Path(__file__).with_name("preload_client.py")
_SERVER = Path(__file__).with_name("preload_server.py")

_servers: dict[tuple[str, ...], _Server] = {}


def fork_instead(
    command: Sequence[str], modules: Sequence[str], cwd: str | Path | None = None
) -> tuple[list[str], socket.socket]:
    """Prepare a Python program that is to find modules already imported.

    Returns:
        A command that has it forked and then ends as it does, and the socket that this must
        inherit, to be closed afterwards.

    Raises:
        EnvError: it is no Python program, or the process that imports cannot be started.
    """
    python, *words = command
    kind = words[0] if words else "-"
    is_option = kind.startswith("-")
    if not Path(python).name.startswith("python") or (is_option and kind not in ("-c", "-m")):
        raise EnvError(
            f"preload={[*modules]} with the program {[*command]}: only Python programs can be "
            "preloaded, [sys.executable, SCRIPT, …], or -m MODULE or -c CODE for SCRIPT"
        )
    cwd = os.path.abspath(cwd or "")
    folder = cwd if is_option else os.path.dirname(os.path.join(cwd, kind))
    key = (python, folder, *modules)
    if key not in _servers or _servers[key].has_ended():
        _servers[key] = _Server(*key)
    ours, theirs = socket.socketpair()
    with theirs:
        _servers[key].connect(theirs)
    return [python, "-IS", os.fspath(_CLIENT), str(ours.fileno()), *words], ours


class _Server:
    """The process that has imported modules; it ends with this one."""

    def __init__(self, python: str, folder: str, *modules: str) -> None:
        self._connections, theirs = socket.socketpair()
        number = theirs.fileno()
        try:
            self._process = subprocess.Popen(
                [python, _SERVER, str(number), folder, *modules],
                env={**os.environ, TOKEN: "0" * TOKEN_LENGTH},  # room for a program's own
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvError(f"program {python!r} cannot be started: {error}") from error
        finally:
            theirs.close()

    def has_ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._connections.close()
        return True

    def connect(self, client: socket.socket) -> None:
        with suppress(OSError):  # it has ended this moment: so will the client
            socket.send_fds(self._connections, [b"\0"], [client.fileno()])
