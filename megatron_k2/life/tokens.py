"""``python -m megatron_k2.life.tokens``: every part of the corpus as ``.bin`` and ``.idx``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_k2.data.preprocess.command import preprocess
from megatron_k2.training.command_line import run_tool

PARTS = ("prose", "code", "tools", "long", "heldout", "long_heldout")


def tokenise(texts: Path, tokenizer: Path, output: Path) -> list[str]:
    """Tokenise the parts, one after the other, what is done skipped; return what failed.

    Raises:
        ValueError: a part is not there.
    """
    kind = ["--tokenizer-type", "KimiTiktokenTokenizer", "--tokenizer-model", str(tokenizer)]
    for part in PARTS:
        files = ["--input", str(texts / f"{part}.jsonl"), "--output-prefix", str(output / part)]
        if failed := preprocess([*files, *kind, "--append-eod", "--workers", "1"]):
            return failed
    return []


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser("python -m megatron_k2.life.tokens", description=__doc__)
    add = made.add_argument
    add("--texts", type=Path, required=True, metavar="DIR", help="of megatron_k2.life.corpus")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="of Kimi's form")
    add("--output", type=Path, required=True, metavar="DIR")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: tokenise(args.texts, args.tokenizer, args.output))


if __name__ == "__main__":
    sys.exit(main())
