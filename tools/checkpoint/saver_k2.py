"""``--saver k2`` of Megatron-LM's tools/checkpoint/convert.py: writes what ``--loader k2`` sends.

torch_dist that every layout loads, or with ``--target-format hf`` a Hugging Face folder in bf16.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.messages import FORMATS, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the format."""
    group = parser.add_argument_group("K2 saver")
    group.add_argument("--target-format", choices=FORMATS, default=FORMATS[0])


def save_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Receive every tensor and write the folder."""
    try:
        save(queue.get, Path(args.save_dir), args.target_format)
    except ConversionRefused as error:
        raise SystemExit(f"--saver k2: {error}") from error
