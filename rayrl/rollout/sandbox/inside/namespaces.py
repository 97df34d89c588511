"""A view of the machine that has the system's programs, a work folder, and nothing else."""

from __future__ import annotations

import _socket  # without its enums: a sandbox starts sooner
import fcntl
import os
import struct
from collections.abc import Sequence

from . import kernel

__all__ = ["USER", "WORK", "build_view", "distinct_user", "enter_namespaces", "readable_system"]

WORK = "/sandbox"  # the work folder, where hardly anybody keeps anything else
USER = 1000  # user and group in the sandbox
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = (
    *(1, 2, 4, 8),
    *(0x20, 0x1000, 0x4000, 0x40000),
)
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/libx32", "/lib64", "/nix/store")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "mime.types")
_ETC_NETWORK = (
    *("resolv.conf", "nsswitch.conf", "gai.conf", "services"),
    *("ssl", "ca-certificates", "pki", "crypto-policies"),
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NEW = "/tmp"  # where the new root is mounted; any folder will do
_FILES_PER_MB = 256


def readable_system(network: bool) -> list[str]:
    """Folders and files of the system that programs need."""
    names = (*_ETC, *(_ETC_NETWORK if network else ()))
    return [*_SYSTEM, *(f"/etc/{name}" for name in names)]


def distinct_user() -> int | None:
    """For root: a user id that nobody else has, so that nobody's rights and limits are shared.

    None if this process is not root, or may be no other user.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        spans = [[int(word) for word in line.split()] for line in file]
    first, _, length = max(spans, key=lambda span: span[2])
    if length < 1 << 12:
        return None
    return first + length // 4 + int.from_bytes(os.urandom(8), "big") % (length // 4)


def enter_namespaces(network: bool) -> None:
    """Leave every namespace but the network's, if that is kept; children have PIDs of their own.

    Root is still root in the new user namespace, where `USER` is a user that nobody else is; anyone
    else is `USER` there.

    Raises:
        OSError: the kernel refuses.
    """
    outside = distinct_user()
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    go, may_go = os.pipe()
    said, say = os.pipe()
    helper = os.fork()
    if not helper:  # it stays outside, where it has the right to write the maps
        try:
            os.close(may_go)
            if os.read(go, 1):
                folder = f"/proc/{os.getppid()}"
                if outside is None:
                    _write(f"{folder}/setgroups", "deny")
                for kind, own in ids.items():
                    root = f"0 {own} 1\n{USER} {outside} 1\n"
                    line = f"{USER} {own} 1\n" if outside is None else root
                    _write(f"{folder}/{kind}_map", line)
        except OSError as error:
            os.write(say, str(error).encode())
        finally:
            os._exit(0)
    os.close(say)
    try:
        flags = _NEWUSER | _NEWNS | _NEWPID | _NEWIPC | _NEWUTS | _NEWCGROUP
        kernel.unshare(flags if network else flags | _NEWNET)
        os.write(may_go, b"x")
    finally:
        os.close(may_go)
        problem = os.read(said, 1000)
        os.waitpid(helper, 0)
        os.close(said)
        os.close(go)
    if problem:
        raise OSError(problem.decode())


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build_view(readable: Sequence[str], disk: int, network: bool) -> None:
    """Make the new root and enter it, as the first process of the namespaces.

    Args:
        readable: folders and files to show read-only at their own paths; those that do not exist
            are left out.
        disk: bytes for the work folder, /tmp and /dev/shm together, which are memory.
        network: the network is the machine's.

    Raises:
        OSError: the kernel refuses.
    """
    kernel.mount("", "/", "", _REC | _PRIVATE)
    links: dict[str, str] = {}
    sources: dict[str, int] = {}
    for path in sorted(set(readable)):
        if path in _SYSTEM and os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.exists(path) and not any(path.startswith(f"{one}/") for one in sources):
            sources[path] = os.open(path, os.O_PATH)  # what is in /tmp will not be seen any more
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in _DEVICES}

    kernel.mount("sandbox", _NEW, "tmpfs", _NOSUID | _NODEV, "mode=755,size=4m")
    os.mkdir(f"{_NEW}/space")
    files = max(1024, (disk >> 20) * _FILES_PER_MB)
    options = f"mode=755,size={disk},nr_inodes={files}"
    kernel.mount("space", f"{_NEW}/space", "tmpfs", _NOSUID | _NODEV, options)
    for path in (WORK, "/tmp", "/dev/shm"):
        shared = f"{_NEW}/space/{path.rpartition('/')[2]}"
        os.mkdir(shared, 0o700)
        os.chown(shared, USER, USER)
        os.makedirs(_NEW + path, exist_ok=True)
        kernel.mount(shared, _NEW + path, "", _BIND)
    kernel.unmount(f"{_NEW}/space")
    os.rmdir(f"{_NEW}/space")
    # after these, so that what lies in the machine's /tmp can be shown
    for path, opened in (sources | devices).items():
        place = _NEW + path
        source = f"/proc/self/fd/{opened}"
        if os.path.isdir(source):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.bind_read_only(source, place, devices=path in devices)
        os.close(opened)
    links |= {"/dev/fd": "/proc/self/fd"}
    links |= {
        f"/dev/std{name}": f"/proc/self/fd/{k}" for k, name in enumerate(("in", "out", "err"))
    }
    for path, target in links.items():
        os.symlink(target, _NEW + path)

    os.makedirs(f"{_NEW}/etc", exist_ok=True)
    _write(f"{_NEW}/etc/passwd", f"sandbox:x:{USER}:{USER}::{WORK}:/bin/sh\n")
    _write(f"{_NEW}/etc/group", f"sandbox:x:{USER}:\n")
    _write(f"{_NEW}/etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost\n")
    os.mkdir(f"{_NEW}/proc")
    kernel.mount("proc", f"{_NEW}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    kernel.pivot_into(_NEW)
    kernel.mount("", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _socket.sethostname("sandbox")
    if not network:
        _start_loopback()


def _start_loopback() -> None:
    """127.0.0.1 is the sandbox's own, for programs that talk to themselves."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    request = struct.pack("16sH22x", b"lo", 0)
    (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, get_flags, request), 16)
    fcntl.ioctl(any_socket, set_flags, struct.pack("16sH22x", b"lo", flags | up))
    any_socket.close()
