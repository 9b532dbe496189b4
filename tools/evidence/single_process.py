"""One training run in one process with one thread, as the evidence scripts start many."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BATCH = (
    *("--k2-device", "cpu", "--k2-threads", "1", "--num-workers", "0"),
    *("--seq-length", "256", "--micro-batch-size", "8", "--global-batch-size", "8"),
)
ATTEMPTS = 3  # another process may take the port between our look and the run's


def text_arguments(tokens: Path, cache: Path) -> list[str]:
    """Return the flags that name the text of ``make pretrain``'s folder of tokens."""
    return [
        *("--tokenizer-type", "SentencePieceTokenizer", "--vocab-size", "8192"),
        *("--tokenizer-model", str(tokens / "tokenizer.model")),
        *("--train-data-path", str(tokens / "train"), "--data-cache-path", str(cache)),
    ]


PRETRAIN, TUNE = "megatron_k2.training.pretrain", "megatron_k2.training.sft"


def train(arguments: Sequence[str], log: Path, module: str = PRETRAIN) -> str:
    """Run a training; return what it printed, also kept in ``log``.

    Raises:
        SystemExit: the run failed; names the log.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | dict(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        )  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        log.write_text(done.stdout + done.stderr)
        if "EADDRINUSE" not in done.stderr:
            break
    if done.returncode:
        raise SystemExit(f"the run failed, see {log}")
    return done.stdout
