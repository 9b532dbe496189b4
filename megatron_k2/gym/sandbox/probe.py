"""A program that tries to get out; a sandbox in which it can is none.

Run when a sandbox is found. The long list is tests/unit/gym/sandbox/attacks.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_k2.gym.sandbox.base import Command, Limits, Sandbox, SandboxError

_PROGRAM = """
import json, os, socket, sys
out = {}
def attempt(name, action):
    try:
        out[name] = repr(action())
    except Exception:
        pass
secret, target, port = sys.argv[1:]
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.settimeout(1)
        return one.connect(address)
attempt("network", lambda: connect(socket.AF_INET, ("127.0.0.1", int(port))))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("secret", lambda: open(secret).read())
attempt("outside", lambda: open(target, "w").write("x"))
attempt("environment", lambda: open("/proc/%d/environ" % os.getppid(), "rb").read(1))
attempt("inherited", lambda: [os.fstat(n) for n in range(3, 64) if not os.set_blocking(n, True)])
attempt("signal", lambda: os.kill(os.getppid(), 0) if os.getppid() > 1 else 1 / 0)
open("mine", "w").write("written")
print(json.dumps(out))
"""


async def probe(sandbox: Sandbox, secret: Path, outside: Path, port: int) -> None:
    """Run the program.

    Args:
        sandbox: to be tried.
        secret: a file that exists and must not be readable.
        outside: a path in an existing folder where nothing may be written.
        port: on this machine, where somebody listens.

    Raises:
        SandboxError: something got out, or the program did not run as it must.
    """
    argv = ("python", "-c", _PROGRAM, str(secret), str(outside), str(port))
    result = await sandbox.run(Command(argv, keep=("mine",), limits=Limits(wall_s=30, cpu_s=10)))
    if result.outcome != "exited" or result.returncode or result.files.get("mine") != b"written":
        words = result.stderr[-500:].decode(errors="replace")
        raise SandboxError(f"a harmless program did not run: {result.outcome}, {words}")
    got_out = json.loads(result.stdout)
    if got_out or outside.exists():
        raise SandboxError(f"a program got out: {', '.join(got_out) or 'it wrote outside'}")
