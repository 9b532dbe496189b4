"""Runs in the sandbox: starts the servers of a dialogue and carries their lines.

They share one working directory. A line of input is ``NAME LINE`` for a server, or ``! state N``
for the hash of the files, which is answered with N; a line of output is ``NAME LINE`` of one, or
``! JSON``: that hash, or that a server ended, wrote too long a line or could not be started. At the
end of input the servers' inputs close, and what has not ended soon is killed with the sandbox. The
host trusts nothing that this program says: a server may have written it. The standard library
alone; the source is the program.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

GRACE_S = 1.0  # for all servers to end when their input has
TAIL_BYTES = 2000  # of a server's last words on stderr
MAX_FILES, MAX_FILE_BYTES = 4096, 1 << 24  # that the hash of the state reads
VOLATILE = (".git/index", ".git/logs")  # they hold times

_lock = threading.Lock()


def say(name: str, line: bytes) -> None:
    """Write a line to the host, whole."""
    with _lock:
        sys.stdout.buffer.write(name.encode() + b" " + line + b"\n")
        sys.stdout.buffer.flush()


def tell(server: str, what: str, **more: Any) -> None:
    """Write what became of a server."""
    say("!", json.dumps({"server": server, "what": what, **more}).encode())


class Server:
    """A server and the three threads that carry its streams."""

    def __init__(self, name: str, spec: dict[str, Any], max_line: int) -> None:
        """Start it."""
        self.name, self.max_line = name, max_line
        self.inbox: queue.Queue[bytes | None] = queue.Queue()
        self.tail = b""
        argv = [sys.executable if one == "python" else one for one in spec["argv"]]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=pipe, env=dict(os.environ) | spec["environ"]
        )
        self.threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self.write, self.read, self.listen)
        ]
        for thread in self.threads:
            thread.start()

    def write(self) -> None:
        """Carry what comes for it."""
        assert self.process.stdin is not None
        try:
            while (line := self.inbox.get()) is not None:
                self.process.stdin.write(line + b"\n")
                self.process.stdin.flush()
            self.process.stdin.close()
        except OSError:  # it reads no more; its end is told by ``read``
            return

    def read(self) -> None:
        """Carry what it says, then tell its end."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline(self.max_line + 1):
            if len(line) > self.max_line:
                tell(self.name, "long_line")
                self.process.kill()
                break
            say(self.name, line.rstrip(b"\n"))
        self.threads[2].join(GRACE_S)
        code = self.process.wait()
        tell(self.name, "exited", code=code, words=self.tail.decode(errors="replace"))

    def listen(self) -> None:
        """Keep its last words."""
        assert self.process.stderr is not None
        while piece := os.read(self.process.stderr.fileno(), 1 << 16):
            self.tail = (self.tail + piece)[-TAIL_BYTES:]


def state() -> str:
    """Return the hash of the paths and contents of the working directory."""
    found = hashlib.sha256()
    count = 0
    for folder, folders, names in os.walk("."):
        folders[:] = sorted(
            one
            for one in folders
            if one != "__pycache__" and not f"{folder}/{one}".endswith(VOLATILE)
        )
        for name in sorted(names):
            path = f"{folder}/{name}"[2:]
            count += 1
            if path.endswith(VOLATILE) or count > MAX_FILES or os.path.islink(path):
                continue
            try:
                with open(path, "rb") as stream:
                    content = stream.read(MAX_FILE_BYTES)
            except OSError:
                continue
            found.update(path.encode(errors="surrogateescape") + b"\0")
            found.update(hashlib.sha256(content).digest())
    return found.hexdigest()[:16]


def set_up(commands: list[list[str]], environ: dict[str, str]) -> bool:
    """Run what makes the files ready, say a repository; tell what fails."""
    for command in commands:
        done = subprocess.run(
            [sys.executable if one == "python" else one for one in command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | environ,
        )
        if done.returncode:
            words = done.stdout.decode(errors="replace")[-TAIL_BYTES:]
            tell("", "setup_failed", words=f"{command[0]}: exit status {done.returncode}: {words}")
            return False
    return True


def main() -> None:
    """Carry lines until the host closes."""
    spec = json.loads(sys.argv[1])
    servers = {}
    if not set_up(spec["setup"], spec["environ"]):
        return
    for name, one in spec["servers"].items():
        try:
            servers[name] = Server(name, one, spec["max_line"])
        except OSError as error:
            tell(name, "not_started", words=str(error))
    for line in sys.stdin.buffer:
        name, _, rest = line.rstrip(b"\n").partition(b" ")
        if name == b"!":
            tell("", "state", id=state(), number=int(rest.split()[-1]))
        elif server := servers.get(name.decode()):
            server.inbox.put(rest)
    for server in servers.values():
        server.inbox.put(None)
    deadline = time.monotonic() + GRACE_S
    for server in servers.values():
        server.threads[1].join(max(0.0, deadline - time.monotonic()))
    with _lock:  # nobody is in the middle of a line
        os._exit(0)


if __name__ == "__main__":
    main()
