"""Runs in the sandbox: an MCP server with code tools, files and unit tests.

Ours, so that there is one without any package: JSON-RPC by lines over stdin and stdout, the
standard library alone (protocol 2025-06-18; no part of it but tools). What it runs is confined as
it is itself; ``SECONDS`` ends a program of the model earlier than the sandbox would.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, CPU_SECONDS = 90, 15  # of the clock: a machine under load gives little of each second
MAX_CHARS = 8000  # of a result
TEXT = {"type": "string"}
TOOK = re.compile(r"(?m)^(Ran \d+ tests?) in [\d.]+s$")  # unittest: other seconds every run


class RefusedError(Exception):
    """The tool says no, in words for the model."""


def inside(path: str) -> Path:
    """Return a path of the working directory."""
    found = (Path.cwd() / path).resolve()
    if not found.is_relative_to(Path.cwd()):
        raise RefusedError(f"{path} is outside the working directory")
    return found


def shown(text: str) -> str:
    """Return a text, its middle left out where it is too long."""
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]}\n[...]\n{text[-half:]}"


def limit_cpu() -> None:
    """End what works for long; what waits, for others on a loaded machine too, has more time."""
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    hard = CPU_SECONDS + 1 if most == resource.RLIM_INFINITY else min(most, CPU_SECONDS + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (min(hard, CPU_SECONDS), hard))


def run(*argv: str) -> str:
    """Run Python; return exit status and output."""
    try:
        done = subprocess.run(
            [sys.executable, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
            preexec_fn=limit_cpu,
        )
    except subprocess.TimeoutExpired:
        raise RefusedError(f"ended after {SECONDS} s") from None
    if done.returncode == -signal.SIGXCPU:
        raise RefusedError(f"ended after {CPU_SECONDS} s of the processor")
    words = TOOK.sub(r"\1", done.stdout.decode(errors="replace"))
    return f"exit status {done.returncode}\n{shown(words)}"


def run_python(code: str) -> str:
    """Run a Python program in the working directory; returns its exit status and output."""
    return run("-c", code)


def run_tests(path: str) -> str:
    """Run the unit tests of a Python file (unittest); returns exit status and output."""
    if not inside(path).is_file():
        raise RefusedError(f"{path} is no file")
    return run("-m", "unittest", path)


def read_text(path: str) -> str:
    """Read a text file of the working directory."""
    if not inside(path).is_file():
        raise RefusedError(f"{path} is no file")
    return shown(inside(path).read_text(encoding="utf-8", errors="replace"))


def write_text(path: str, content: str) -> str:
    """Write a text file of the working directory, over what is there."""
    target = inside(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    return f"{len(content.encode())} bytes written to {path}"


def replace_text(path: str, old: str, new: str) -> str:
    """Replace a piece of a text file that occurs in it exactly once."""
    text = inside(path).read_text(encoding="utf-8") if inside(path).is_file() else ""
    if (count := text.count(old)) != 1:
        raise RefusedError(f"the piece occurs {count} times in {path}, not once")
    return write_text(path, text.replace(old, new))


def list_paths() -> str:
    """List all files of the working directory, a path a line."""
    found = (path.relative_to(Path.cwd()).as_posix() for path in Path.cwd().rglob("*"))
    return shown("\n".join(sorted(one for one in found if "__pycache__" not in one)))


TOOLS: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "run_python": (run_python, ("code",)),
    "run_tests": (run_tests, ("path",)),
    "read_text": (read_text, ("path",)),
    "write_text": (write_text, ("path", "content")),
    "replace_text": (replace_text, ("path", "old", "new")),
    "list_paths": (list_paths, ()),
}


def declarations() -> list[dict[str, Any]]:
    """Return the tools as MCP has them."""
    return [
        {
            "name": name,
            "description": tool.__doc__,
            "inputSchema": {
                "type": "object",
                "properties": dict.fromkeys(names, TEXT),
                "required": list(names),
                "additionalProperties": False,
            },
        }
        for name, (tool, names) in TOOLS.items()
    ]


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a call."""
    try:
        if name not in TOOLS or set(arguments) != set(TOOLS[name][1]):
            raise RefusedError(f"no tool {name} with arguments {', '.join(arguments)}")
        text, is_error = TOOLS[name][0](**arguments), False
    except (RefusedError, OSError, TypeError, ValueError) as error:
        text, is_error = str(error), True
    return {"content": [{"type": "text", "text": text}], "isError": is_error}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a request; None for a method that there is not."""
    if method == "initialize":
        info = {"name": "megatron-k2-code", "version": "1"}
        capabilities: dict[str, Any] = {"tools": {}}
        version = "2025-06-18"
        return {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}
    if method == "tools/list":
        return {"tools": declarations()}
    if method == "tools/call":
        return call(params["name"], params.get("arguments") or {})
    return {} if method == "ping" else None


def main() -> None:
    """Answer lines until they end."""
    sys.dont_write_bytecode = True
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or "method" not in message:
            continue
        reply = {"jsonrpc": "2.0", "id": message["id"]}
        result = answer(message["method"], message.get("params") or {})
        if result is None:
            reply["error"] = {"code": -32601, "message": "Method not found"}
        else:
            reply["result"] = result
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
