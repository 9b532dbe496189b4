"""A training command as one of its ranks would run it, without the others and without a number.

``rank.py`` builds the rank on the meta device under Megatron's own fake process group
(``--fake-process-group``), inside a ``ShapeTrace``. What is planned here is what the command does.
On the host the modules are the local ones, whatever ``--transformer-impl`` will be on the GPU, and
weights have the format of the flags (``--bf16``). One process can be one rank after the other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_k2 import register
from megatron_k2.device import meta_device
from megatron_k2.planning import rank as ranks
from megatron_k2.planning.rank import TrainingRank
from megatron_k2.planning.trace import ShapeTrace

FLAGS = ("--fake-process-group", "--k2-device=cpu", "--mock-data")
"""Added to a command: no message, no device, no data."""


@contextlib.contextmanager
def dry_rank(
    command: Sequence[str],
    rank: int,
    world_size: int,
    *,
    with_optimizer: bool = True,
    device: str = "cuda",
) -> Iterator[tuple[TrainingRank, ShapeTrace]]:
    """Become one rank of a training command; the context ends with the fake world.

    Args:
        command: arguments of ``megatron_k2.training.pretrain``.
        rank: global.
        world_size: of the run.
        with_optimizer: build it too; without, chunks have no DDP buffers either.
        device: that the meta device stands for; experts' tokens travel otherwise on the host.

    Yields:
        the rank, and the trace in which it was built and which is in force within the context.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    trace = ShapeTrace()
    arguments = ranks.command_line([*command, *FLAGS])
    with silence(), arguments, _environment(rank, world_size), _meta_is(device):
        args, container = _parse()
        devices = torch.distributed.Backend.backend_capability["fake"]
        if "meta" not in devices:  # point-to-point calls look for the backend of their device
            devices.append("meta")
        try:
            with trace:
                with contextlib.redirect_stderr(io.StringIO()):
                    rank_built = ranks.build(args, container, with_optimizer=with_optimizer)
                yield rank_built, trace
        finally:
            ranks.forget()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _parse() -> tuple[Any, Any]:
    """Register K2 and parse the command line; what either prints is for a run's log, not a plan's.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        register("cpu", [])
        try:
            return ranks.parse()
        except SystemExit:  # argparse has printed why
            last = said.getvalue().strip().rsplit("\n", 1)[-1]
    raise ValueError(last)


def load() -> None:
    """Import what a dry run needs, and register K2, with nothing printed."""
    with silence(), contextlib.redirect_stderr(io.StringIO()):
        register("cpu", [])
        from megatron.core.tokenizers import text  # noqa: F401
        from megatron.training import initialize, training  # noqa: F401


@contextlib.contextmanager
def _meta_is(device: str) -> Iterator[None]:
    token = meta_device.set(device)
    try:
        yield
    finally:
        meta_device.reset(token)


@contextlib.contextmanager
def _environment(rank: int, world_size: int) -> Iterator[None]:
    """Set what torchrun would."""
    wanted = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep Megatron's pages of arguments, log and warnings off the terminal."""
    level, hook = logging.root.manager.disable, sys.excepthook
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
            sys.excepthook = hook  # torch puts the rank before each line of a traceback
