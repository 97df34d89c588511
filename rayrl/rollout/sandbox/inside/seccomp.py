"""The filter of system calls: what code that computes, reads and writes does not need.

Denied are ways to memory that no limit counts, ways to other processes, and the parts of the kernel
in which ways out were found most often. All else is allowed.
"""

from __future__ import annotations

import errno
import struct

__all__ = ["filter_for"]

# System calls by name: their numbers on x86_64 and aarch64.
_DENIED = {
    # memory that belongs to no process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # the kernel itself
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
_NEW_NAMESPACE = 0x7E020000  # any of clone's CLONE_NEW…
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK; AF_VSOCK has no namespace
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def _do(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _refuse(number: int) -> bytes:
    return _do(_RETURN, _ERRNO | number)


def filter_for(machine: str) -> bytes:
    """Return the filter in BPF for `os.uname().machine`; empty if it is not known here."""
    if machine not in _ARCHITECTURE:
        return b""
    column = list(_ARCHITECTURE).index(machine)
    code = [_do(_LOAD, _ARCH), _do(_IF_EQUAL, _ARCHITECTURE[machine], 1), _refuse(errno.EPERM)]
    code += [_do(_LOAD, _NUMBER)]
    code += [_do(_IF_AT_LEAST, 0x40000000, 0, 1), _refuse(errno.ENOSYS)]  # x32's numbers
    # its flags lie in memory, which a filter cannot read; libc then calls clone
    code += [_do(_IF_EQUAL, _CLONE3[column], 0, 1), _refuse(errno.ENOSYS)]
    for numbers in _DENIED.values():
        code += [_do(_IF_EQUAL, numbers[column], 0, 1), _refuse(errno.EPERM)]
    code += [_do(_IF_EQUAL, _CLONE[column], 0, 4), _do(_LOAD, _FIRST_ARGUMENT)]
    code += [_do(_IF_ANY_BIT, _NEW_NAMESPACE, 0, 1), _refuse(errno.EPERM), _do(_RETURN, _ALLOW)]
    code += [_do(_IF_EQUAL, _SOCKET[column], 1), _do(_IF_EQUAL, _SOCKETPAIR[column], 0, 6)]
    code += [_do(_LOAD, _FIRST_ARGUMENT)]
    for k, family in enumerate(_FAMILIES):
        code += [_do(_IF_EQUAL, family, len(_FAMILIES) - k)]
    code += [_refuse(errno.EAFNOSUPPORT), _do(_RETURN, _ALLOW)]
    return b"".join(code)
