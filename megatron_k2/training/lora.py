"""``tools/lora.py``: adapters of a training run for everybody else, and into the weights.

examples:
  # the adapters of a checkpoint of a run with --k2-lora-rank, as PEFT, vLLM and SGLang read them
  lora.py export checkpoints ADAPTER
  # a Hugging Face folder with the adapter in its weights; all other tensors byte for byte
  lora.py merge Kimi-K2-Instruct ADAPTER Kimi-K2-tuned

Killed at any moment, the target is not there and the same command begins again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.checkpoint import peft
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.merge import merge


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    parser = argparse.ArgumentParser(
        prog="lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="Megatron checkpoint -> PEFT folder")
    out.add_argument("source", type=Path, help="folder of --save, or one of its iterations")
    out.add_argument("target", type=Path, help="the PEFT folder to write")
    out.add_argument("--base", help="base_model_name_or_path of adapter_config.json")
    into = commands.add_parser("merge", help="Hugging Face folder + PEFT folder -> folder")
    into.add_argument("source", type=Path, help="Hugging Face folder of the base")
    into.add_argument("adapter", type=Path, help="PEFT folder")
    into.add_argument("target", type=Path, help="the Hugging Face folder to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for what is refused."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "export":
            count = peft.export(arguments.source, arguments.target, arguments.base)
            print(f"{arguments.target}: {count} tensors of adapters")
        else:
            changed, kept = merge(arguments.source, arguments.adapter, arguments.target)
            print(f"{arguments.target}: {changed} tensors changed, {kept} byte for byte as before")
    except ConversionRefused as error:
        print(f"lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0
