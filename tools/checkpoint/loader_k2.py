"""``--loader k2`` of Megatron-LM's tools/checkpoint/convert.py: a Hugging Face folder of the
DeepSeek-V3 family (FP8 and INT4 dequantised) or a torch_dist checkpoint of one, by ``--load-dir``.

PYTHONPATH=THIS_FOLDER:MEGATRON_LM python MEGATRON_LM/tools/checkpoint/convert.py --model-type GPT \
    --loader k2 --saver k2 --load-dir Kimi-K2-Instruct --save-dir OUT

One process and no resuming: tools/convert_checkpoint.py does the same faster.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.messages import messages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: ``--load-dir`` says it all."""


def load_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Send every tensor; on an error tell the saver to stop."""
    try:
        for message in messages(Path(args.load_dir)):
            queue.put(message)
    except ConversionRefused as error:
        queue.put("exit")
        raise SystemExit(f"--loader k2: {error}") from error
