"""A seccomp filter as bytes: refuse a list of system calls, namespaces, and sockets but Unix ones.

What sandlock's own filter leaves open: it refuses no ``clone3`` with namespaces, and only IP's
datagram and raw sockets; Landlock knows TCP alone (not MPTCP, SCTP, vsock, AF_ALG ...) and asks
about no limit or priority set for another process. Filters add up: the kernel takes the strictest
answer. Classic BPF, see Linux's seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from collections.abc import Iterable

from megatron_k2.gym.sandbox.keeper.syscalls import ARGUMENTS, REFUSED

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit arch, column of tables
_NAMESPACES = 0x7E020000  # every CLONE_NEW* of clone
_X32 = 0x40000000  # system calls of another ABI on x86_64
_PR_SET_DUMPABLE = 4  # an undumpable process could not be measured
_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument
Line = tuple[int, int, int, int]
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def filter_bytes(allow: Iterable[str] = (), machine: str = "") -> bytes:
    """Return the filter that refuses ``REFUSED`` without ``allow``.

    Args:
        allow: names that stay.
        machine: as ``platform.machine`` says; empty: this one.

    Raises:
        ValueError: no table for the machine.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"the sandbox knows {', '.join(MACHINES)}; this is {machine}")
    arch, column = MACHINES[machine]
    numbers = {name: both[column] for name, both in (REFUSED | ARGUMENTS).items()}
    number = {name: one for name, one in numbers.items() if one is not None}
    code: list[Line] = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQ, 1, 0, arch), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NR)]
    if machine == "x86_64":
        code += [(_JUMP_GE, 0, 1, _X32), _fail(errno.ENOSYS)]
    for name in REFUSED:
        if name not in allow and name in number:
            code += [(_JUMP_EQ, 0, 1, number[name]), _fail(errno.EPERM)]
    # Its flags are in memory, where no filter looks; glibc falls back to clone.
    code += [(_JUMP_EQ, 0, 1, number["clone3"]), _fail(errno.ENOSYS)]
    code += _look(number["clone"], [(_JUMP_SET, 0, 1, _NAMESPACES), _fail(errno.EPERM)])
    code += _look(number["socket"], [(_JUMP_EQ, 1, 0, socket.AF_UNIX), _fail(errno.EACCES)])
    code += _look(number["prctl"], [(_JUMP_EQ, 0, 1, _PR_SET_DUMPABLE), _fail(errno.EPERM)])
    for name in ("prlimit64", "sched_setaffinity"):  # by 0 for itself, not for another process
        code += _look(number[name], [(_JUMP_EQ, 1, 0, 0), _fail(errno.EPERM)])
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _fail(number: int) -> Line:
    return (_RETURN, 0, 0, _ERRNO | number)


def _look(number: int, checks: list[Line]) -> list[Line]:
    """Check a system call's first argument, then load its number again."""
    inner = [(_LOAD, 0, 0, _ARG0), *checks, (_LOAD, 0, 0, _NR)]
    return [(_JUMP_EQ, 0, len(inner), number), *inner]
