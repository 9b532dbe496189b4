"""Whole training runs in milliseconds instead of ten seconds: forked from a process that is warm.

A zygote imports torch and Megatron and registers the CPU layer once. Each ``Zygote.train`` forks
it once per rank; the child runs ``megatron_k2.training.pretrain`` with the arguments given, as
torchrun would start it, with its output in a file. Children can be killed with any signal and
started again, which is what the tests of faults need. Each writes its losses, bit for bit, to a
file that survives ``kill -9``. Run as ``python -m tests.distributed.trainings ADDRESS``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import inspect
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 180
RUNNER = "K2_TEST_RUNNER"
# What a training imports on its way, so that no child pays for it.
WARM = (
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.tokenizers.text.text_tokenizer",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "megatron_k2.checkpoint.async_writer",
    "megatron_k2.model.specs",
    "megatron_k2.training.pretrain",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
# A model of seconds: one dense and one MoE layer, fp32, no dropout, losses on every step.
ARGUMENTS = (
    "--k2-device=cpu",
    "--k2-preset=k2-micro",
    "--k2-precision=fp32",
    "--no-k2-max-attention-logit",
    "--tokenizer-type=NullTokenizer",
    "--vocab-size=1023",
    "--num-workers=0",
    "--seq-length=32",
    "--micro-batch-size=1",
    "--global-batch-size=4",
    "--lr=1e-3",
    "--use-distributed-optimizer",
    "--dist-ckpt-optim-fully-reshardable",
    "--log-interval=1",
    "--eval-iters=0",
)


class Training:
    """One running job: its processes, its output and its losses."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self.folder = pids, folder
        self._watched: list[int] = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # refused and gone already
                self._watched.append(os.pidfd_open(pid))

    def kill(self, sig: int = signal.SIGKILL, ranks: slice = slice(None)) -> None:
        """Send a signal to ranks that still run."""
        for pid in self.pids[ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    def wait(self, timeout_s: float = 240.0) -> list[int | None]:
        """Wait until every rank has ended; return exit codes, None for a killed rank."""
        deadline = time.monotonic() + timeout_s
        for watched in self._watched:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([watched], [], [], left)[0]:
                self.kill(signal.SIGUSR1)  # stacks
                time.sleep(0.5)
                self.kill()
                raise TimeoutError(f"no end within {timeout_s} s\n{self.output()}")
            os.close(watched)
        self._watched = []
        return [self._code(rank) for rank in range(len(self.pids))]

    def ended(self) -> bool:
        """Return whether some rank has ended."""
        is_gone = len(self._watched) < len(self.pids)
        return is_gone or bool(select.select(self._watched, [], [], 0)[0])

    def wait_for(self, text: str, count: int = 1, timeout_s: float = 120.0) -> None:
        """Wait until the output holds a text, or holds it so many times."""
        deadline = time.monotonic() + timeout_s
        while self.output().count(text) < count:
            if time.monotonic() > deadline or self.ended():
                self.kill()
                raise TimeoutError(f"{text!r} did not appear\n{self.output()}")
            time.sleep(0.05)

    def output(self) -> str:
        """Return the last output of every rank."""
        texts = (path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))
        return "\n".join(text[-20_000:] for text in texts)

    def losses(self) -> dict[int, str]:
        """Return loss and gradient norm of each logged iteration as exact hexadecimal floats."""
        path = self.folder / "losses"
        lines = path.read_text().splitlines() if path.exists() else []
        return {int(step): values for step, _, values in (line.partition(" ") for line in lines)}

    def _code(self, rank: int) -> int | None:
        path = self.folder / f"{rank}.code"
        return int(path.read_text()) if path.exists() else None


class Zygote:
    """The warm process and the trainings forked from it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="k2-trainings-")
        self.listener = Listener(str(Path(self.folder.name) / "socket"), family="AF_UNIX")
        environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.trainings", str(self.listener.address)],
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        self.connection: Any = None
        self.count = 0

    def train(
        self, *arguments: str, world_size: int = 2, environment: dict[str, str] | None = None
    ) -> Training:
        """Start one training; the arguments follow ``ARGUMENTS`` and win over them.

        Random tokens, unless a ``--data-path=`` is among the arguments. ``environment`` may name
        another runner than pretraining by ``RUNNER``.
        """
        if self.connection is None:
            self.connection = self._connect()
        self.count += 1
        folder = Path(self.folder.name) / str(self.count)
        folder.mkdir()
        argv = [*ARGUMENTS, *arguments]
        given = ("--data-path=", "--train-data-path=")
        if not any(argument.startswith(given) for argument in arguments):
            argv.append("--mock-data")
        self.connection.send((argv, world_size, _free_port(), str(folder), environment or {}))
        return Training(self.connection.recv(), folder)

    def _connect(self) -> Any:
        listening = self.listener._listener._socket  # type: ignore[attr-defined]
        if not select.select([listening], [], [], START_TIMEOUT_S)[0]:
            raise TimeoutError("the zygote did not start (see above)")
        return self.listener.accept()

    def close(self) -> None:
        """End the zygote and, with it, whatever it forked."""
        self.process.kill()
        self.process.wait()
        self.listener.close()
        self.folder.cleanup()


@functools.cache
def zygote() -> Zygote:
    """Return the one warm process of this pytest session."""
    warm = Zygote()
    atexit.register(warm.close)
    return warm


_given_ports: set[int] = set()


def _free_port() -> int:
    """Return a port that nobody listens on and that no training still on its way was given."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def serve(address: str) -> None:
    """Import everything, then fork trainings on request until the other side hangs up."""
    from tests.distributed.worker import die_with_parent

    die_with_parent()
    import torch

    torch.set_num_threads(1)
    import megatron_k2

    megatron_k2.register("cpu")
    for module in WARM:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child then skips what is shared

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    client = Client(address, family="AF_UNIX")
    while True:
        try:
            argv, world_size, port, folder, environment = client.recv()
        except EOFError:
            return
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                die_with_parent()
                client.close()
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                    LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port), **environment,
                )  # fmt: skip
                _child(argv, rank, Path(folder))
            pids.append(pid)
        client.send(pids)


def _child(argv: list[str], rank: int, folder: Path) -> None:
    """Run one rank and leave its exit code in a file."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = (folder / f"{rank}.log").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    sys.argv = ["pretrain", *argv]
    code = 1
    try:
        code = _run(folder)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        (folder / f"{rank}.code").write_text(str(code))
        os._exit(code)


def _run(folder: Path) -> int:
    from megatron.training import training

    from megatron_k2.training.command_line import run_as_command

    runner = importlib.import_module(os.environ.get(RUNNER, "megatron_k2.training.pretrain"))
    if limit := os.environ.get("K2_TEST_FAULT"):
        from tests.distributed import faults

        faults.install(limit)
    log = training.training_log
    signature = inspect.signature(log)

    def log_losses(*args: Any, **kwargs: Any) -> Any:
        called = signature.bind(*args, **kwargs).arguments
        if called["loss_dict"]:
            values = [*called["loss_dict"].values(), called["grad_norm"]]
            exact = " ".join(float(value).hex() for value in values)
            with (folder / "losses").open("a") as stream:
                stream.write(f"{called['iteration']} {exact}\n")
        return log(*args, **kwargs)

    training.training_log = log_losses
    return run_as_command(runner.main)


def tensors_of(directory: Path) -> dict[str, Any]:
    """Return every whole tensor of a torch_dist checkpoint by its layout-independent name."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = checkpoint.FileSystemReader(str(directory))
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


if __name__ == "__main__":
    serve(sys.argv[1])
