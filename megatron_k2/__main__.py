"""``torchrun -m megatron_k2 SCRIPT ARGS``: register K2, then run a stock Megatron script unchanged.

The script's own folder, and the checkout above it, come first on the path, so that a Megatron-LM
script uses its own ``megatron``; ``--k2-megatron wheel`` keeps the installed one in front.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = """usage: torchrun [OPTIONS] -m megatron_k2 [--k2-megatron checkout|wheel] SCRIPT [ARGS]

Registers megatron_k2 and runs an unmodified Megatron script with its arguments and --k2-* flags.

examples:
  torchrun --nproc-per-node 8 -m megatron_k2 pretrain_gpt.py --k2-preset kimi-k2 ...
  python -m megatron_k2 tools/preprocess_data.py --input corpus.jsonl ...
"""


def main(argv: list[str] | None = None) -> int:
    """Run the script named on the command line; returns the exit status for a usage error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    root = "checkout"
    if arguments[0] == "--k2-megatron":
        root, arguments = (arguments[1:2] or [""])[0], arguments[2:]
    if root not in ("checkout", "wheel") or not arguments:
        message = (
            f"megatron_k2: error: --k2-megatron {root!r} is not checkout or wheel, or no SCRIPT"
        )
        print(message, file=sys.stderr)
        return 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"megatron_k2: error: SCRIPT {script} does not exist", file=sys.stderr)
        return 2
    if any(argument.partition("=")[0] == "--k2-load-hf" for argument in arguments):
        message = (
            "megatron_k2: error: --k2-load-hf is of `-m megatron_k2.training.pretrain`; for a "
            "stock script convert the folder (convert_checkpoint.py to-megatron) and --load it"
        )
        print(message, file=sys.stderr)
        return 2
    sys.argv = [str(script), *arguments[1:]]
    _set_path(script.resolve().parent, root)
    from megatron_k2.training.command_line import run_as_command

    return run_as_command(lambda: runpy.run_path(str(script), run_name="__main__"))


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
