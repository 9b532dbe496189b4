"""Do the real parsers take the commands of the documents? Nothing is run.

``python tests/docs/flags.py < commands.json``, a process of its own: registering K2 changes the one
it happens in. Reads ``{"commands": [[place, words, is whole], ...], "written": [names of files that
pages write]}`` and prints ``[[place, what is wrong], ...]``. A tool is run as its own script up
to the moment when its parser has taken the arguments. A training command that is whole is also
checked by Megatron's and K2's validation, in a world of the size that torchrun would make.
Programs that are not ours are looked at by name alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.docs.commands import commands_of  # noqa: E402  found through the line above

OTHERS = frozenset((
    "cat", "cd", "cp", "curl", "diff", "docker", "echo", "export", "git", "grep", "head", "ln",
    "kill", "ls", "mkdir", "pip", "python", "sed", "sleep", "source", "test", "trap", "wait",
    ".venv/bin/pip", ".venv/bin/tensorboard",
))  # fmt: skip
DATA = ("--data-path", "--train-data-path", "--valid-data-path")
WRITTEN: set[str] = set()
_MISSING = "the following arguments are required"


class Parsed(BaseException):
    """A tool's parser has taken its arguments; what it would do then is left out."""


def problem_of(words: Sequence[str], is_whole: bool) -> str:
    """Return what is wrong with a command, empty if nothing is."""
    program, *rest = words
    if program.endswith("python") and rest:
        return _python(rest, is_whole)
    if program.endswith("torchrun"):
        return _torchrun(rest, is_whole)
    if program == "make":
        return _make(rest)
    if program == "sbatch" and "--wrap" in rest:
        (wrapped,) = commands_of(rest[rest.index("--wrap") + 1])
        return problem_of(wrapped.words, wrapped.is_whole)
    if program in ("sbatch", "bash") or program.endswith(".sh"):
        script = rest[0] if program in ("sbatch", "bash") and rest else program
        return "" if (ROOT / script).is_file() else f"no script {script}"
    if program == "pytest":
        return _paths(rest)
    if program.endswith(".py"):  # a room's README leaves the path to tools/ out
        return _script(f"tools/{program}", rest, is_whole)
    return "" if program in OTHERS else f"program {program} is not known"


def _python(rest: list[str], is_whole: bool) -> str:
    if rest[0] == "-W":
        return _python(rest[2:], is_whole)
    if rest[0] == "-c":
        with contextlib.suppress(SyntaxError):
            compile(rest[1], "-c", "exec")
            return ""
        return "not Python"
    if rest[:2] == ["-m", "pytest"]:
        return _paths(rest[2:])
    if rest[0] == "-m" and not rest[2:]:  # nothing to parse, and it would be run
        with contextlib.suppress(ModuleNotFoundError):
            return "" if find_spec(rest[1]) else f"no module {rest[1]}"
        return f"no module {rest[1]}"
    if rest[0] == "-m":
        run = lambda: runpy.run_module(rest[1], run_name="__main__", alter_sys=True)  # noqa: E731
        return _stopped(run, rest[1], rest[2:], is_whole)
    return _script(rest[0], rest[1:], is_whole)


def _script(script: str, arguments: list[str], is_whole: bool) -> str:
    path = ROOT / script
    if not path.is_file():
        return "" if script in WRITTEN else f"no script {script}"
    if not arguments or (script.startswith("examples") and "argparse" not in path.read_text()):
        return ""  # nothing to parse, or no parser to stop at
    return _stopped(
        lambda: runpy.run_path(str(path), run_name="__main__"), script, arguments, is_whole
    )


def _paths(words: list[str]) -> str:
    named = [word.partition("::")[0] for word in words if word.startswith("tests")]
    return "".join(
        f"no {name} " for name in named if name not in WRITTEN and not (ROOT / name).exists()
    )


def _make(words: list[str]) -> str:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [word for word in words if "=" not in word]
    return ", ".join(f"no make target {name}" for name in named if name not in targets)


def _stopped(run: Callable[[], Any], name: str, arguments: list[str], is_whole: bool) -> str:
    """Run a script until its parser is done; return the parser's complaint."""
    said = io.StringIO()
    path, argv, environment = list(sys.path), sys.argv, dict(os.environ)
    sys.argv, sys.path[:] = [name, *arguments], [str(ROOT / "tools"), *path]
    try:
        with _parsers_stop(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            run()
    except Parsed as parsed:
        return str(parsed)
    except SystemExit as ended:
        if not ended.code:
            return ""  # --help
    except Exception as error:  # a fault of the tool's own checks, before its parser
        said.write(f"{type(error).__name__}: {error}")
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
    if not is_whole and _MISSING in said.getvalue():
        return ""  # words that were left out
    lines = said.getvalue().strip().splitlines()
    return lines[-1] if lines else "its parser was never asked"


@contextlib.contextmanager
def _parsers_stop() -> Iterator[None]:
    """Let the outermost parser raise ``Parsed`` when it is done."""
    whole, known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse_known(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found = known(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            raise Parsed(_megatron(found[1]) if found[1] else "")
        return found

    def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            whole(self, *args, **kwargs)
        finally:
            depth -= 1
        raise Parsed

    argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign, assignment]
    argparse.ArgumentParser.parse_known_args = parse_known  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = whole  # type: ignore[method-assign]
        argparse.ArgumentParser.parse_known_args = known  # type: ignore[method-assign]


def _megatron(words: list[str]) -> str:
    """Return what Megatron's parser says of words that a tool hands on to it."""
    return _training("megatron_k2.training.pretrain", words, 1, is_whole=False)


def _torchrun(words: list[str], is_whole: bool) -> str:
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            launched = get_args_parser().parse_args(words)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    module, arguments = launched.training_script, launched.training_script_args
    if module == "megatron_k2":  # a stock script, with the arguments of ours
        module, arguments = "megatron_k2.training.pretrain", arguments[1:]
    nodes = launched.nnodes.rpartition(":")[2]  # least:most
    return _training(module, arguments, int(launched.nproc_per_node) * int(nodes), is_whole)


def _training(module: str, arguments: list[str], world_size: int, is_whole: bool) -> str:
    """Return what is wrong with the arguments of a training."""
    from megatron.training.arguments import validate_args

    from megatron_k2.training import pretrain, rl, sft

    add, check = {
        "megatron_k2.training.pretrain": (pretrain.add_stage_args, pretrain.refuse_unsupported),
        "megatron_k2.training.sft": (sft.add_sft_args, sft.check_sft_args),
        "megatron_k2.training.rl": (rl.add_rl_args, rl.check_rl_args),
    }[module]
    before, sys.argv = sys.argv, [module, *_of_no_folder(arguments)]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.update(ranks)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            args = _parsed(add)
            if is_whole:
                sys.argv[1:] = _without_data(sys.argv[1:])  # which is not here
                args = _parsed(add)
                args.rank, args.world_size = 0, world_size  # as upstream's parse_args has them
                validate_args(args, {"train_iters": 1} if module.endswith("rl") else {})
                check(args)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    except (ValueError, AssertionError) as error:
        message = str(error)
        return "" if not is_whole and _MISSING in message else message
    finally:
        sys.argv = before
        for name in ranks:
            del os.environ[name]
    return ""


def _parsed(add: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> Any:
    """Return what Megatron's parser makes of this process's command line."""
    from megatron.training.arguments import add_megatron_arguments

    return add(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))).parse_args()


def _without_data(arguments: list[str]) -> list[str]:
    """Return arguments without the paths of their data."""
    found: list[str] = []
    skipped = False
    for word in arguments:
        skipped = word in DATA if word.startswith("--") else skipped
        if not skipped:
            found.append(word)
    return found


def _of_no_folder(arguments: list[str]) -> list[str]:
    """Return arguments without folders that are not here: a preset stands in for their model."""
    found, words = [], list(arguments)
    while words:
        word = words.pop(0)
        if word == "--k2-load-hf" or (word == "--k2-preset" and words and _is_folder(words[0])):
            model = words.pop(0)
            name = "moonlight-16b-a3b" if "oonlight" in model else "kimi-k2"
            found += ["--k2-preset", name if "imi" in model or "oonlight" in model else "k2-micro"]
        else:
            found.append(word)
    return found


def _is_folder(value: str) -> bool:
    from megatron_k2.presets import list_presets

    return value not in list_presets()


def main() -> None:
    """Read commands, print problems."""
    import megatron_k2

    with contextlib.redirect_stderr(io.StringIO()):
        megatron_k2.register("cpu", [])
    given = json.load(sys.stdin)
    WRITTEN.update(given["written"])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # should a tool write before its parser is asked
        problems = [
            (place, f"{' '.join(words)[:100]}: {problem}")
            for place, words, is_whole in given["commands"]
            if (problem := problem_of(words, is_whole))
        ]
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
