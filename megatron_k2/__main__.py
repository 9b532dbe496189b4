"""``megatron-k2 COMMAND`` or ``python -m megatron_k2 COMMAND``; or a stock script, registered.

A command is a row of ``commands.py``. Anything else is the file of a Megatron script, which runs
unchanged once K2 is registered: ``torchrun -m megatron_k2 SCRIPT ARGS``. The script's own folder,
and the checkout above it, come first on the path, so that a Megatron-LM script uses its own
``megatron``; ``--k2-megatron wheel`` keeps the installed one in front.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from megatron_k2 import __version__
from megatron_k2.commands import PROGRAM, Command, as_typed, find, listing, near

USAGE = f"""usage: {PROGRAM} COMMAND [ARGS]         (or: python -m megatron_k2 COMMAND [ARGS])
       torchrun [OPTIONS] -m megatron_k2 [--k2-megatron checkout|wheel] SCRIPT [ARGS]

A COMMAND has a --help of its own. A SCRIPT is an unmodified Megatron script: it runs with its
arguments and --k2-* flags, once megatron_k2 is registered.

{{commands}}
examples:
  {PROGRAM} doctor
  {PROGRAM} plan --k2-preset kimi-k2 --gpus 256 --cluster h800
  torchrun --nproc-per-node 2 -m megatron_k2 pretrain --k2-preset k2-nano ...
  torchrun --nproc-per-node 8 -m megatron_k2 pretrain_gpt.py --k2-preset kimi-k2 ...
  python -m megatron_k2 tools/preprocess_data.py --input corpus.jsonl ...
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command or script named on the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands=listing()))
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    command = find(arguments[0])
    return run_script(arguments) if command is None else run_command(command, arguments[1:])


def run_command(command: Command, arguments: list[str]) -> int:
    """Run a command of the table with its arguments; returns its exit status."""
    sys.argv = [f"{PROGRAM} {command.name}", *arguments]
    _name_commands_as_typed(command)
    try:
        function = command.load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "megatron_k2":
            raise  # our own fault, not a missing package
        line = f"{sys.executable} -m pip install {error.name}"
        told = line if command.name == "doctor" else f"`{PROGRAM} doctor` says what installs it"
        return _refuse(f"{command.name} needs a package that is not installed: {error}; {told}")
    if not command.is_plain:
        return int(function() or 0)
    from megatron_k2.training.command_line import run_tool

    return run_tool(function)


def run_script(arguments: list[str]) -> int:
    """Register K2 and run a stock script; returns the exit status."""
    root = "checkout"
    if arguments[0] == "--k2-megatron":
        root, arguments = (arguments[1:2] or [""])[0], arguments[2:]
    if root not in ("checkout", "wheel") or not arguments:
        return _refuse(f"--k2-megatron {root!r} is not checkout or wheel, or no SCRIPT")
    script = Path(arguments[0])
    if not script.is_file():
        meant = near(script.name)
        hint = f"; did you mean the command {meant}?" if meant else ", and no command is so named"
        return _refuse(f"SCRIPT {script} does not exist{hint}")
    if any(argument.partition("=")[0] == "--k2-load-hf" for argument in arguments):
        return _refuse(
            "--k2-load-hf is of `-m megatron_k2.training.pretrain`; for a stock script "
            "convert the folder (megatron-k2 convert-checkpoint to-megatron) and --load it"
        )
    sys.argv = [str(script), *arguments[1:]]
    _set_path(script.resolve().parent, root)
    from megatron_k2.training.command_line import run_as_command

    return run_as_command(lambda: runpy.run_path(str(script), run_name="__main__"))


def _refuse(message: str) -> int:
    print(f"megatron_k2: error: {message}", file=sys.stderr)
    return 2


def _name_commands_as_typed(command: Command) -> None:
    """Let parsers of this process print ``megatron-k2 gym`` where they say ``gym.py``.

    argparse has no hook for it: help, usage and errors all go through this one method, the same
    since Python 2.7. Were it gone, the texts would name the checkout's files.
    """
    printed = getattr(argparse.ArgumentParser, "_print_message", None)
    if printed is None:
        return

    def print_as_typed(parser: Any, message: str, file: Any = None) -> None:
        printed(parser, as_typed(message, command.name) if message else message, file)

    argparse.ArgumentParser._print_message = print_as_typed  # type: ignore[assignment]


def _set_path(folder: Path, root: str) -> None:
    """Order ``sys.path``: the script's checkout first, or after the installed packages."""
    holders = (
        parent for parent in (folder, *folder.parents) if (parent / "megatron/core").is_dir()
    )
    entries = list(dict.fromkeys([str(folder), str(next(holders, folder))]))
    rest = [entry for entry in sys.path if entry not in entries]
    sys.path[:] = [*entries, *rest] if root == "checkout" else [*rest, *entries]


if __name__ == "__main__":
    sys.exit(main())
