"""Judges a program, inside the sandbox and outside the program: the process that has the tests.

Copied into the sandbox as ``driver.py``. The driver reads its order from its input and answers on
its output, neither of which the program's processes have. They get inputs and arguments alone:
expected outputs never enter the sandbox, and tests that are code (``asserts``) run in the driver,
where the function they test stands for calls to another process. What comes back is JSON, so
nothing of the program's runs in the driver. Standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

CASE_OUTPUT_BYTES = 1 << 20  # of a case; more than any expected output
_ERROR_CHARS = 300  # of the end of a traceback, for people
_SOLUTION, _FUNCTION = "solution.py", "solution"


class NoAnswerError(Exception):
    """The program ended, or took too long, in a call."""


def encode(value: Any) -> Any:
    """Return a plain value as JSON that tells lists from tuples.

    Raises:
        TypeError: a value of another kind.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(one)] for key, one in value.items()]}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": value.hex()}
    for mark, kinds in {"l": list, "t": tuple, "s": (set, frozenset)}.items():
        if isinstance(value, kinds):  # type: ignore[arg-type]
            return {mark: [encode(one) for one in value]}
    raise TypeError(f"a {type(value).__name__} cannot be compared")


def decode(value: Any) -> Any:
    """Return the value of ``encode``'s JSON."""
    if not isinstance(value, dict):
        return value
    ((mark, inner),) = value.items()
    if mark == "d":
        return {decode(key): decode(one) for key, one in inner}
    if mark == "c":
        return complex(*inner)
    if mark == "b":
        return bytes.fromhex(inner)
    make = {"l": list, "t": tuple, "s": set}[mark]
    return make(decode(one) for one in inner)


class Function:
    """The program's function, in a process of its own.

    Processor time decides what takes too long; wall time only ends what waits for ever, because on
    a loaded machine a right answer may take many times as long.
    """

    def __init__(self, name: str, cpu_s: float, wall_s: float) -> None:
        self.name, self.cpu_s, self.wall_s = name, cpu_s, wall_s
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it.

        Raises:
            NoAnswerError: it ended or took too long.
            Exception: that it raised, by name if it is one of Python's.
        """
        process = self._running()
        assert process.stdin is not None
        order = {"arguments": encode(arguments), "named": encode(named)}
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(self._line(process))
            value = None if "raised" in reply else decode(reply["value"])
        except (NoAnswerError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise NoAnswerError(f"no answer: {error}") from None
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(str(reply.get("words")))
        return value

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)
            self._process = None
            self._rest = b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            argv = [sys.executable, __file__, "serve", self.name]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                argv,
                stdin=pipe,
                stdout=pipe,
                start_new_session=True,
                preexec_fn=lambda: _limit_cpu(self.cpu_s),
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline = time.monotonic() + self.wall_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise NoAnswerError(f"none within {self.wall_s} s")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            self._rest += piece
            if not piece or len(self._rest) > CASE_OUTPUT_BYTES:
                raise NoAnswerError("it ended" if not piece else "it answers too much")
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def serve(name: str) -> None:
    """Be the program's side: answer calls until there are none."""
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    orders = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    failed: Exception | None = None
    try:
        function = _load(name)
    except Exception as error:
        failed = error
    for line in orders:
        order = json.loads(line)
        try:
            if failed:
                raise failed
            value = function(*decode(order["arguments"]), **decode(order["named"]))
            reply = {"value": encode(value)}
        except Exception as error:
            reply = {"raised": type(error).__name__, "words": str(error)[:_ERROR_CHARS]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(_FUNCTION, _SOLUTION)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_FUNCTION] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def judge_calls(order: dict[str, Any]) -> dict[str, Any]:
    """Call the function with each case's arguments; return what came back."""
    function = Function(order["entry"], order["cpu_s"], order["wall_s"])
    found: list[dict[str, Any]] = []
    for arguments in order["cases"]:
        try:
            found.append({"value": encode(function(*decode(arguments)))})
        except NoAnswerError as error:  # the next would not answer either
            left = len(order["cases"]) - len(found)
            found += [{"raised": "NoAnswerError", "words": str(error)}] * left
            break
        except Exception as error:
            found.append({"raised": type(error).__name__, "words": str(error)[:_ERROR_CHARS]})
    function.close()
    return {"cases": found}


def judge_asserts(order: dict[str, Any]) -> dict[str, Any]:
    """Run the tests here; what they test is elsewhere."""
    function = Function(order["entry"], order["cpu_s"], order["wall_s"])
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(order["prompt"], "prompt", "exec"), names)
            names |= {order["entry"]: function, "candidate": function}
            exec(compile(order["test"], "tests", "exec"), names)
            if callable(names.get("check")):
                names["check"](function)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return {"passed": False, "words": words[:_ERROR_CHARS]}
    finally:
        function.close()
    return {"passed": True, "words": ""}


def judge_streams(order: dict[str, Any]) -> dict[str, Any]:
    """Run the program on each case's input; return what it printed."""
    found: list[dict[str, Any]] = []
    for text in order["cases"]:
        one = _run(text.encode(), order["timeout_s"], order["wall_s"])
        found.append(one)
        if one["late"]:  # the others wait for nothing
            return {"cases": found + [one] * (len(order["cases"]) - len(found))}
    return {"cases": found}


def _run(text: bytes, timeout_s: float, wall_s: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as errors:
        source.write(text)
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, _SOLUTION],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=lambda: _limit_cpu(timeout_s),
        )
        printed, late = _read(process, wall_s)
        _end(process)
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - _ERROR_CHARS))
        words = errors.read(_ERROR_CHARS).decode(errors="replace")
    late = late or process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    return {
        "printed": printed.decode(errors="replace"),
        "returncode": process.returncode or int(late),
        "late": late,
        "words": f"more than {timeout_s} s" if late else words,
    }


def _limit_cpu(timeout_s: float) -> None:
    seconds = max(1, round(timeout_s))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _read(process: subprocess.Popen[bytes], wall_s: float) -> tuple[bytes, bool]:
    """Return what a process prints until it closes its output, and whether it took too long."""
    assert process.stdout is not None
    deadline = time.monotonic() + wall_s
    printed = b""
    while len(printed) < CASE_OUTPUT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return printed, True
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            try:
                process.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return printed, True
            return printed, False
        printed += piece
    return printed, False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its session."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


FORMS = {"calls": judge_calls, "asserts": judge_asserts, "streams": judge_streams}


def main() -> None:
    """Take an order, answer."""
    sys.set_int_max_str_digits(0)
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
        return
    order = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reply = FORMS[order["form"]](order)
    answers.write(json.dumps(reply))
    answers.close()


if __name__ == "__main__":
    main()
