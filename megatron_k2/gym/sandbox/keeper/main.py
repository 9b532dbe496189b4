"""Runs one program: takes an order from a socket, answers with the result, and ends.

The first message says its process id, the second the result. If the host closes the socket, or
dies, all ends at once. Failures of the keeper's own are answered as ``error``; a program's end
never is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_k2.gym.sandbox.keeper import kernel, launch, namespaces, wire
from megatron_k2.gym.sandbox.keeper.watch import HostGoneError, Relay, Stream, Watch

SPARE_PROCESSES = 16  # the keeper, sandlock's threads, bubblewrap's two: of the same user
MAX_OPEN_FILES = 256
ALL_FILES = "."  # in what is to be kept: the whole working directory
MAX_KEPT_FILES = 4096  # of it
_NICENESS = 5  # a host under load answers first
_PYVENV = "home = {home}\ninclude-system-site-packages = false\n"


def main(descriptor: int, *ends: int) -> None:
    """Take the order that comes on a socket, run it, answer, and exit.

    Args:
        descriptor: of the socket.
        ends: of the program's input and output, where the host speaks with it; else none.
    """
    control = socket.socket(fileno=descriptor)
    for one in (descriptor, *ends):  # recv_fds gives inheritable ones, whatever its flags
        os.set_inheritable(one, False)
    status = 0
    try:
        control.sendall(wire.pack({"keeper": os.getpid()}))
        order, blobs = wire.receive(control)
        answer, found = _run(order, blobs, control, ends)
        control.setblocking(True)
        control.sendall(wire.pack(answer, found))
    except (HostGoneError, EOFError, BrokenPipeError, ConnectionResetError):
        status = 1
    except Exception as error:  # whatever it is, the host must hear of it
        control.sendall(wire.pack({"error": f"{type(error).__name__}: {error}"}))
    os._exit(status)


def _run(
    order: dict[str, Any], blobs: list[bytes], control: socket.socket, ends: tuple[int, ...]
) -> tuple[dict[str, Any], list[bytes]]:
    keeper = os.getpid()
    os.umask(0o022)
    os.nice(_NICENESS)
    if order["private"]:
        child = namespaces.enter(order["readable"], order["limits"]["disk_bytes"])
        if child:
            for one in ends:  # the program's end must show
                os.close(one)
            os.waitpid(child, 0)
            os._exit(0)
        root = namespaces.SCRATCH
    else:
        kernel.adopt_orphans()
        root = tempfile.mkdtemp(prefix="k2-sandbox-", dir=order["scratch"])
    try:
        return _run_in(root, keeper, order, blobs, control, ends)
    finally:
        if not order["private"]:
            _remove(root)


def _run_in(
    root: str,
    keeper: int,
    order: dict[str, Any],
    blobs: list[bytes],
    control: socket.socket,
    ends: tuple[int, ...],
) -> tuple[dict[str, Any], list[bytes]]:
    box = f"{root}/box"
    _furnish(root, box, order["python"], dict(zip(order["files"], blobs[1:], strict=True)))
    limits = order["limits"]
    if order["private"]:
        _give(box, namespaces.FIRST_UID + keeper)
        namespaces.become_nobody(keeper)
    kernel.gain_no_privileges()
    kernel.drop_capabilities()
    _limit_resources(limits, order["private"])
    _feed(blobs[0], ends)
    argv = [f"{root}/venv/bin/python" if order["argv"][0] == "python" else order["argv"][0]]
    start = launch.Start(
        argv=argv + order["argv"][1:],
        environ={"PATH": f"{root}/venv/bin:/usr/bin:/bin", "HOME": box, "TMPDIR": box}
        | order["environ"],
        box=box,
        readable=[*order["readable"], f"{root}/venv"],
        num_processes=limits["num_processes"],
        private=order["private"],
        name=f"k2-{keeper}",
    )
    began = time.monotonic()
    if order["bubblewrap"]:
        started = launch.by_bubblewrap(start, order["bubblewrap"])
    else:
        started = launch.by_sandlock(start)
    most = limits["output_bytes"]
    stdout = Relay(started.stdout, most, host=ends[1]) if ends else Stream(started.stdout, most)
    streams = (stdout, Stream(started.stderr, most))
    watch = Watch(started.pid, streams, control, limits, "" if order["private"] else box)
    try:
        outcome, status = watch.run()
    except HostGoneError:
        watch.end()
        raise
    for one in ends[1:]:  # before the answer: a host that reads to the end then takes it
        os.close(one)
    if order["bubblewrap"] and 128 < status <= 192 and outcome == "exited":
        outcome, status = "killed", 128 - status  # as shells do, bwrap tells a signal so
    kept = _read_kept(box, order["keep"], limits["disk_bytes"])
    answer = {"outcome": outcome, "returncode": status, "wall_s": time.monotonic() - began}
    outputs = [bytes(stream.data) for stream in streams]
    return {**answer, "kept": list(kept)}, [*outputs, *kept.values()]


def _furnish(root: str, box: str, python: str, files: dict[str, bytes]) -> None:
    """Write the program's files, and an interpreter that has no site-packages."""
    (Path(root) / "venv" / "bin").mkdir(parents=True)
    (Path(root) / "venv" / "bin" / "python").symlink_to(python)
    home = _PYVENV.format(home=os.path.dirname(python))
    (Path(root) / "venv" / "pyvenv.cfg").write_text(home)
    Path(box).mkdir()
    for name, content in files.items():
        path = Path(box) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _remove(root: str) -> None:
    """Remove a folder, however deep and however its modes."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(root, ignore_errors=True)
    if os.path.lexists(root):
        for program, option in (("/bin/chmod", "u+rwX"), ("/bin/rm", "-f")):
            child = os.posix_spawn(program, [program, "-R", option, root], {})
            os.waitpid(child, 0)


def _give(box: str, uid: int) -> None:
    """Make a folder and all in it another user's, if we are root."""
    if os.getuid() == 0:
        for folder, _, names in os.walk(box):
            for path in (folder, *(f"{folder}/{name}" for name in names)):
                os.chown(path, uid, uid)


def _limit_resources(limits: dict[str, Any], private: bool) -> None:
    """Set the kernel's limits, for this process too: it stays far below them."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_DATA: limits["memory_bytes"],
    }
    if private:  # elsewhere it would count all processes of our user
        wanted[resource.RLIMIT_NPROC] = limits["num_processes"] + SPARE_PROCESSES
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def _feed(stdin: bytes, ends: tuple[int, ...]) -> None:
    """Make descriptor 0 a read-only file of the program's input, or the host's pipe."""
    if ends:
        os.dup2(ends[0], 0)
        os.close(ends[0])
        os.set_blocking(ends[1], False)
        return
    source = os.memfd_create("stdin", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(source), "wb") as stream:
        stream.write(stdin)
    reader = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(reader, 0)
    os.close(reader)
    os.close(source)


def _read_kept(box: str, names: list[str], limit: int) -> dict[str, bytes]:
    """Return the contents of regular files, following no link, ``limit`` bytes in all."""
    found: dict[str, bytes] = {}
    for name in _files_of(box) if ALL_FILES in names else names:
        try:
            content = _read_regular(box, name, limit)
        except OSError:  # not there, or not what was asked for
            continue
        if content is not None:
            found[name] = content
            limit -= len(content)
    return found


def _files_of(box: str) -> list[str]:
    """Return the paths of the first files of a folder, without following links, in order."""
    found: list[str] = []
    for folder, folders, names in os.walk(box):
        folders.sort()
        found += [os.path.relpath(f"{folder}/{name}", box) for name in sorted(names)]
        if len(found) > MAX_KEPT_FILES:
            break
    return found[:MAX_KEPT_FILES]


def _read_regular(box: str, name: str, limit: int) -> bytes | None:
    *folders, last = Path(name).parts
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    held = [os.open(box, flags | os.O_DIRECTORY)]
    try:
        for folder in folders:
            held.append(os.open(folder, flags | os.O_DIRECTORY, dir_fd=held[-1]))
        held.append(os.open(last, flags, dir_fd=held[-1]))
        state = os.fstat(held[-1])
        if not stat.S_ISREG(state.st_mode) or state.st_size > limit:
            return None
        with os.fdopen(held.pop(), "rb") as stream:
            return stream.read(limit)
    finally:
        for descriptor in held:
            os.close(descriptor)
