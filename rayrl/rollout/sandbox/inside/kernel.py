"""System calls that Python 3.11 has no functions for."""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "bind_read_only",
    "bound_capabilities",
    "die_with_parent",
    "drop_capabilities",
    "forbid_new_privileges",
    "hide_from_others",
    "install_filter",
    "mount",
    "pivot_into",
    "reap_orphans",
    "unmount",
    "unshare",
]

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442  # everywhere
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC = 2, 4, 0x1000, 0x4000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_MNT_DETACH = 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: int, address: object = 0) -> int:
    rest = address if address else ctypes.c_ulong(0)
    zero = ctypes.c_ulong(0)
    return int(_libc.prctl(option, ctypes.c_ulong(value), rest, zero, zero))


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount; an empty string is no value."""
    words = [word.encode() or None for word in (source, target, kind, options)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(result, f"mount {kind or source} at {target}")


def unmount(target: str) -> None:
    """Take a mount away; what is in use stays until it is not."""
    _check(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def bind_read_only(source: str, target: str, *, devices: bool = False) -> None:
    """Show a folder or file, and what is mounted in it, read-only at another place."""
    mount(source, target, "", _MS_BIND | _MS_REC)
    attributes = _ATTR_RDONLY | _ATTR_NOSUID | (0 if devices else _ATTR_NODEV)
    setting = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # set, clear, propagation, user namespace
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        target.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        setting,
        ctypes.c_size_t(ctypes.sizeof(setting)),
    )
    _check(result, f"mount_setattr {target}")


def pivot_into(root: str) -> None:
    """Make a mounted folder the root, and let go of the old one."""
    os.chdir(root)
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def die_with_parent(signal: int) -> None:
    """Have the kernel send a signal when the parent ends."""
    _check(_prctl(_PR_SET_PDEATHSIG, signal), "prctl")


def hide_from_others() -> None:
    """No other process of this user may trace this one, or read its memory and open files."""
    _check(_prctl(_PR_SET_DUMPABLE, 0), "prctl")


def reap_orphans() -> None:
    """Become the parent of descendants whose parent has ended."""
    _check(_prctl(_PR_SET_CHILD_SUBREAPER, 1), "prctl")


def forbid_new_privileges() -> None:
    """No program that is started gains rights (set-user-id, file capabilities)."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "prctl")


def bound_capabilities() -> None:
    """No program that is started can have a capability; only for who has the right to say so."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability) < 0:
            break  # the kernel has no more


def drop_capabilities() -> None:
    """Give up every capability."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(instructions: bytes) -> None:
    """Install a filter of system calls (BPF instructions of 8 bytes each)."""
    program = _Program(len(instructions) // 8, instructions)
    _check(_prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program)), "seccomp")
