"""Namespaces of a run: its own processes, network, mounts, IPC and host name.

Root makes them as it is, others in a user namespace. All that is mounted is in memory and the
kernel drops it with the last process, so nothing is left behind, whoever is killed. Top folders
are covered by empty ones, with what may be read bound back into them, read-only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.gym.sandbox.keeper import kernel

SCRATCH = "/tmp"
FIRST_UID = 1_879_048_192  # plus the keeper's pid: a user of nobody else, where we are root
MAX_FILES = 16_384  # in the private file system
_FLAGS = (
    os.CLONE_NEWNS
    | os.CLONE_NEWPID
    | os.CLONE_NEWNET
    | os.CLONE_NEWIPC
    | os.CLONE_NEWUTS
    | os.CLONE_NEWCGROUP
)
_WRITABLE = {"dev/shm": "size=1m,mode=1777"}  # sandlock's record of the run; the program cannot


def enter(readable: Sequence[str], disk_bytes: int) -> int:
    """Fork a process into new namespaces.

    Args:
        readable: absolute paths that keep their content, devices included.
        disk_bytes: room in ``SCRATCH``.

    Returns:
        0 in the new process, which is the first of its namespace; its process id in this one.

    Raises:
        OSError: this system allows no such namespaces.
    """
    uid, gid = os.getuid(), os.getgid()
    os.unshare(_FLAGS | (os.CLONE_NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        _mount_all(readable, disk_bytes)
    return child


def become_nobody(keeper_pid: int) -> int:
    """Take a user id of our own if we are root; return the user id."""
    if os.getuid() == 0:
        uid = FIRST_UID + keeper_pid
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        kernel.set_dumpable(True)  # a change of user clears it, and sandlock asks its child for fds
    return os.getuid()


def _mount_all(readable: Sequence[str], disk_bytes: int) -> None:
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in readable}
    for name in sorted(os.listdir("/")):
        top = f"/{name}"
        if name == "proc" or top in held or os.path.islink(top) or not os.path.isdir(top):
            continue
        options = "size=1m,mode=755"
        if top == SCRATCH:
            options = f"size={disk_bytes},nr_inodes={MAX_FILES},mode=755"
        kernel.mount("none", top, "tmpfs", kernel.MS_NOSUID, options)
    for path, descriptor in held.items():
        if path.count("/") > 1:
            _bind(path, descriptor)
        os.close(descriptor)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NOEXEC | kernel.MS_NODEV)
    for name, options in _WRITABLE.items():
        os.makedirs(f"/{name}", exist_ok=True)
        kernel.mount("none", f"/{name}", "tmpfs", kernel.MS_NOSUID | kernel.MS_NOEXEC, options)
    kernel.set_mount("/", on=kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID, recursive=True)
    for path in (SCRATCH, "/proc", *(f"/{name}" for name in _WRITABLE)):
        kernel.set_mount(path, off=kernel.MOUNT_ATTR_RDONLY)


def _bind(path: str, descriptor: int) -> None:
    """Bring back what a covered folder held at a path."""
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    kernel.mount(source, path, "", kernel.MS_BIND | kernel.MS_REC)
