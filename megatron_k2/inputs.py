"""Checks of a run's data and vocabulary, before anything is built on them.

Upstream fails late on these: a missing prefix inside the dataset builder on some ranks, a token
outside the vocabulary as an index error in the embedding. Each check raises ``UsageError`` with the
value, what is allowed and the flag.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

_DATA_FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_SAMPLED_PARTS, _PART_BYTES = 64, 1 << 17
"""Read from a .bin file: 8 MiB in evenly spaced parts, all of a smaller one. Enough to meet the ids
of a foreign tokenizer, fast at any size."""


class UsageError(ValueError):
    """A user's input that cannot work; the message is one line and names the flag."""


def positive_int(text: str) -> int:
    """Return a whole number of at least 1: the ``type`` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is none, or smaller.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ValueError: it cannot be read, or is not TOML; the message names it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error


def data_prefixes(args: Any) -> Iterator[tuple[str, str]]:
    """Yield (flag, prefix) of every dataset on the command line; blend weights are left out."""
    for name in _DATA_FLAGS:
        for item in getattr(args, name, None) or ():
            if not _is_weight(item):
                yield "--" + name.replace("_", "-"), item


def check_data_files(args: Any) -> None:
    """Check that every dataset prefix names a ``.bin`` and ``.idx`` file that is not empty.

    Raises:
        UsageError: a file is missing or empty.
    """
    for flag, prefix in data_prefixes(args):
        for suffix in (".bin", ".idx"):
            path = prefix + suffix
            if not os.path.exists(path):
                raise UsageError(
                    f"{flag} {prefix}: {path} does not exist; give the prefix of a .bin/.idx pair"
                )
            if os.path.getsize(path) == 0:
                raise UsageError(f"{flag} {prefix}: {path} is empty; tokenise a text that is not")


def require_data(args: Any) -> None:
    """Check that a training run names any data at all.

    Raises:
        UsageError: it does not.
    """
    files = ("data_args_path", "per_split_data_args_path")
    named = any(data_prefixes(args)) or any(getattr(args, name, None) for name in files)
    if not (named or args.mock_data or args.skip_train):
        raise UsageError("no data: give --data-path PREFIX of a .bin/.idx pair, or --mock-data")


def check_splits(args: Any) -> None:
    """Check that every part of ``--split`` gets a document of every ``--data-path``.

    Upstream repeats a part until it fills the samples asked for, without end if it is empty
    (``core/datasets/gpt_dataset.py`` ``_get_num_epochs``).

    Raises:
        UsageError: a part with a share above 0 is empty.
    """
    if not args.data_path or not args.split:
        return
    shares = [float(share) for share in re.findall(r"[.0-9]+", args.split)]
    names = ("training", "validation", "test")
    for flag, prefix in data_prefixes(args):
        if flag != "--data-path":
            continue
        documents, upto = _num_sequences(prefix), 0.0
        for name, share in zip(names, shares, strict=False):
            first = round(upto / sum(shares) * documents)
            upto += share
            if share > 0 and round(upto / sum(shares) * documents) <= first:
                raise UsageError(
                    f"--split {args.split} leaves none of the {documents} documents of {flag} "
                    f"{prefix} for {name}; give it a larger share, or 0 "
                    "(--split 100,0,0 with --eval-iters 0 trains on all of them)"
                )


def _num_sequences(prefix: str) -> int:
    """Return the number of sequences that an index file states."""
    with open(prefix + ".idx", "rb") as index:
        index.seek(9 + 8 + 1)  # magic, version, type: indexed_dataset.py, _INDEX_HEADER
        return int.from_bytes(index.read(8), "little")


def check_vocabulary(args: Any, tokenizer: Any) -> None:
    """Check that tokenizer, preset and data speak of the same vocabulary.

    Args:
        args: validated arguments with ``padded_vocab_size`` set.
        tokenizer: has ``vocab_size``.

    Raises:
        UsageError: the preset's vocabulary differs from the tokenizer's, an explicit
            ``--vocab-size`` is too small for it, or a sample of the data holds ids outside it.
    """
    size = int(tokenizer.vocab_size)
    explicit = "vocab_size" in getattr(args, "k2_explicit", ())
    if args.k2_preset and not explicit and args.vocab_size not in (None, size):
        raise UsageError(
            f"--k2-preset {args.k2_preset} has a vocabulary of {args.vocab_size}, the tokenizer "
            f"{args.tokenizer_type} one of {size}; give --vocab-size {size} to build the model for "
            "the tokenizer, or another --tokenizer-model"
        )
    if explicit and size > args.padded_vocab_size:
        raise UsageError(
            f"--vocab-size {args.vocab_size} is smaller than the tokenizer's {size} entries"
        )
    for flag, prefix in data_prefixes(args):
        largest = _largest_sampled_id(prefix)
        if largest >= args.padded_vocab_size:
            raise UsageError(
                f"{flag} {prefix} holds token {largest}, outside the vocabulary of "
                f"{args.padded_vocab_size}; tokenise it with this --tokenizer-model"
            )


def _largest_sampled_id(prefix: str) -> int:
    """Return the largest token id in a sample of a dataset, see ``_SAMPLED_PARTS``."""
    from megatron.core.datasets.indexed_dataset import DType

    try:
        with open(prefix + ".idx", "rb") as index:
            index.seek(9 + 8)  # magic and version: indexed_dataset.py, _INDEX_HEADER
            dtype = DType.dtype_from_code(index.read(1)[0])
        tokens = numpy.memmap(prefix + ".bin", dtype=dtype, mode="r")
    except (IndexError, KeyError, ValueError) as error:
        raise UsageError(f"{prefix}.idx and .bin are damaged ({error}); tokenise again") from error
    size = _PART_BYTES // tokens.itemsize
    last = max(0, tokens.size - size)
    starts = sorted({round(part * last / (_SAMPLED_PARTS - 1)) for part in range(_SAMPLED_PARTS)})
    if tokens.size <= size * _SAMPLED_PARTS:
        return int(tokens.max())
    return max(int(tokens[start : start + size].max()) for start in starts)


def _is_weight(item: str) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return True
