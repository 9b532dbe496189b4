"""Training scripts and tools as commands: a user's error is one line and an exit status."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def run_as_command(main: Callable[[], Any]) -> int:
    """Register K2, run ``main`` and turn a usage error into one line and exit status 2.

    Only errors about a user's input are shortened; anything else keeps its traceback. A process
    that fails really ends, so that its launcher can end the others.

    Args:
        main: what to run once K2 is registered.
    """
    import megatron_k2
    from megatron_k2.checkpoint.errors import ConversionRefused
    from megatron_k2.checkpoint.intact import CheckpointRefused
    from megatron_k2.checkpoint.save_outcome import exit_code_of_last_save
    from megatron_k2.inputs import UsageError
    from megatron_k2.registration import PatchError
    from megatron_k2.upstream_errors import explain

    try:
        megatron_k2.register()
    except (ImportError, ValueError, PatchError) as error:
        return _refuse(error)
    try:
        with exit_code_of_last_save():
            main()
    except (UsageError, CheckpointRefused, ConversionRefused) as error:
        _kill_data_workers()
        return _refuse(error)
    except BaseException as error:
        _kill_data_workers()
        message = explain(error)
        if message is None:
            raise
        return _refuse(UsageError(message))
    return 0


def document_(parser: argparse.ArgumentParser, text: str | None) -> None:
    """Let the help of a training script end in its own text, and its usage be short.

    Args:
        parser: with Megatron's arguments, whose usage alone would be hundreds of lines.
        text: the script's docstring, with an example.
    """
    parser.usage = "%(prog)s --k2-preset NAME [FLAGS]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{text}\nK2's own flags begin with --k2-: --help | grep -A 3 -e --k2-"


def run_tool(run: Callable[[], Sequence[str] | None]) -> int:
    """Run a resumable tool, which starts trainings in processes of their own.

    Args:
        run: returns what failed and did not stop it, a line each; None or nothing if all went well.

    Returns:
        Exit status: 0 done, 1 something failed, 2 bad input (``ValueError``), 130 stopped by a
        signal.
    """
    warnings.simplefilter("ignore")  # upstream's, on Transformer Engine: tools need none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        failed = run() or ()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0


def _kill_data_workers() -> None:
    """Kill the data loader's processes, which the interpreter would wait for without end.

    Under ``--exit-signal-handler`` they ignore the SIGTERM it sends them
    (``megatron/training/datasets/data_samplers.py`` worker_init_fn), and a traceback keeps the
    loader alive that would tell them to stop.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _refuse(error: Exception) -> int:
    """Print the error once a machine: another node's may be its own, a missing file say."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"megatron_k2: error: {error}", file=sys.stderr, flush=True)
    return 2
