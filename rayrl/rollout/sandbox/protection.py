"""What can hold code on this machine, and the command that starts a sandbox's supervisor."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrl.errors import EnvError, did_you_mean
from rayrl.rollout.sandbox.inside.namespaces import USER, WORK, distinct_user, readable_system

__all__ = ["ISOLATIONS", "Isolation", "Protection", "sandbox_protection", "supervisor_command"]

Isolation = Literal["full", "best", "limits"]
ISOLATIONS = ("full", "best", "limits")
_FOLDER = str(Path(__file__).parent)
_MAIN = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from inside import supervisor; supervisor.main(sys.argv[2])"
)
_OF_PYTHON = ("bin", "lib", "lib64", "libexec", "include", "share", "ssl", "pyvenv.cfg")
_PROBE_S = 60.0
_PROC = Path("/proc/sys")
_IN_DOCKER = Path("/.dockerenv")
_PROBE = {"memory": 1 << 28, "disk": 1 << 20, "processes": 1, "network": False, "readable": []}


@dataclass(frozen=True, slots=True)
class Protection:
    """What holds code in a sandbox.

    Attributes:
        kind: "namespaces" that rayrl makes, those of "bubblewrap", or "limits" alone.
        missing: what is not protected, a sentence each; empty for full protection.
    """

    kind: Literal["namespaces", "bubblewrap", "limits"]
    missing: tuple[str, ...] = ()


_LIMITS_ALONE = (
    "Code reads and writes the files that its user may.",
    "Code reaches the network, and servers on this machine.",
    "Code sees other processes, and those of its user it may end and read the environment of.",
    "Code that ends the process that watches it may leave processes behind.",
    "The size of each file is limited, not that of the work folder.",
)
_NO_FILTER = "System calls are not filtered on this processor."


def sandbox_protection(isolation: Isolation = "full") -> Protection:
    """Return what sandboxes are held by on this machine. Tries it once per process (0.1 s).

    Args:
        isolation: "full": namespaces, rayrl's or bubblewrap's, or an error; "limits": limits of
            resources alone; "best": full where it can be had, else limits.

    Raises:
        EnvError: the machine does not offer it; says why, and how to get it.
    """
    if isolation not in ISOLATIONS:
        near = did_you_mean(str(isolation), ISOLATIONS)
        raise EnvError(f"isolation={isolation!r}: one of {', '.join(ISOLATIONS)}.{near}")
    if sys.platform != "linux":
        raise EnvError("sandboxes take Linux; on other systems, run rayrl in a Linux container")
    if isolation == "limits":
        return _limits()
    try:
        return _full()
    except EnvError:
        if isolation == "full":
            raise
        return _limits()


@functools.cache  # errors are not kept: they may pass
def _full() -> Protection:
    try:
        return _try("namespaces")
    except EnvError as error:
        why = f"namespaces: {error}"
    if shutil.which("bwrap"):  # which may have rights that this process has not
        try:
            return _try("bubblewrap")
        except EnvError as error:
            why += f"; bubblewrap: {error}"
    else:
        why += "; bubblewrap is not installed"
    raise EnvError(
        f"this machine offers no full isolation for a sandbox ({why}). To get it: {_remedy()}. To "
        "do without, which lets code read this user's files and use the network: "
        'isolation="limits"'
    )


@functools.cache
def _limits() -> Protection:
    return _try("limits")


def _try(kind: Literal["namespaces", "bubblewrap", "limits"]) -> Protection:
    try:
        with tempfile.TemporaryDirectory(prefix="rayrl-sandbox-") as work:
            command = supervisor_command(kind, {**_PROBE, "work": work})
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, env={}
            )
        said = json.loads(done.stdout[4:])
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvError(str(error)) from None
    except ValueError:
        raise EnvError(done.stderr.decode(errors="replace").strip()[-500:]) from None
    if "error" in said:
        raise EnvError(said["error"])
    missing = _LIMITS_ALONE if kind == "limits" else ()
    return Protection(kind, missing if said["filter"] else (*missing, _NO_FILTER))


def _remedy() -> str:
    """How to get namespaces here."""
    switches = {
        "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
        "kernel/unprivileged_userns_clone": ("0", "1"),
        "user/max_user_namespaces": ("0", "10000"),
    }
    for name, (bad, good) in switches.items():
        file = _PROC / name
        if file.is_file() and file.read_text().strip() == bad:
            return f"`sudo sysctl -w {name.replace('/', '.')}={good}`, or install bubblewrap"
    if _IN_DOCKER.exists() or "KUBERNETES_SERVICE_HOST" in os.environ:
        return (
            "start the container with `--security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined --security-opt systempaths=unconfined` (Kubernetes: "
            "seccompProfile and appArmorProfile Unconfined, procMount Unmasked)"
        )
    return "allow user namespaces (Linux 5.14 or newer), or install bubblewrap"


def supervisor_command(kind: str, settings: dict[str, Any]) -> list[str]:
    """The command that starts a supervisor; see `inside/supervisor.py` for its settings."""
    readable = [*readable_system(settings["network"]), *_python_folders(), *settings["readable"]]
    settings = {**settings, "isolation": kind, "readable": readable}
    if kind != "bubblewrap":
        return [sys.executable, "-I", "-S", "-c", _MAIN, _FOLDER, json.dumps(settings)]
    settings = {**settings, "isolation": "made", "readable": []}
    words = []
    user = distinct_user()
    if user is not None:  # as root, code would own the kernel's settings in /proc
        words = [shutil.which("setpriv") or "setpriv", f"--reuid={user}", f"--regid={user}"]
        words += ["--clear-groups"]
    words += [shutil.which("bwrap") or "bwrap", "--unshare-all"]
    words += ["--share-net"] if settings["network"] else []
    words += ["--unshare-user", "--uid", str(USER), "--gid", str(USER), "--hostname", "sandbox"]
    words += ["--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    words += ["--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    for place in (WORK, "/tmp", "/dev/shm"):
        words += ["--perms", "0700", "--size", str(settings["disk"]), "--tmpfs", place]
    words += [*_binds([*readable, _FOLDER]), "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*words, sys.executable, "-I", "-S", "-c", _MAIN, _FOLDER, json.dumps(settings)]


def _binds(paths: Sequence[str]) -> list[str]:
    words = []
    for path in sorted(set(paths)):
        if Path(path).is_symlink() and Path(path).parent == Path("/"):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind-try", path, path]
    return words


def _python_folders() -> list[str]:
    """Where this Python and its packages lie; not all of its prefix, which may be a home."""
    prefixes = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    prefixes.add(str(Path(os.path.realpath(sys.executable)).parent.parent))
    return [f"{prefix.rstrip('/')}/{name}" for prefix in prefixes for name in _OF_PYTHON]
