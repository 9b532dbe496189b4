"""A tiktoken vocabulary, read strictly: base64 of a token and its rank, one a line.

tiktoken's own ``load_tiktoken_bpe`` reads a file of the same path from a cache in the temporary
folder, however old, and takes holes and twins as they come; both end in wrong token ids. The rank
is the token's id and the order of merges.
"""

from __future__ import annotations

import binascii
from pathlib import Path

NUM_BYTES = 256
_LFS = b"version https://git-lfs.github.com/spec/"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token -> rank of a rank file.

    Args:
        path: the file; 163,584 lines for Kimi K2, any number for a trained stand-in.

    Raises:
        ValueError: the file is missing or a Git LFS pointer; a line is not base64 and a number; a
            token or a rank is given twice; the ranks leave a hole; one of the 256 bytes is no
            token. The message names the file and the line.
    """
    return parse_ranks(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def parse_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Return token -> rank of a rank file's bytes; see ``read_ranks``."""
    if data.startswith(_LFS):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for line, text in enumerate(data.split(b"\n"), 1):
        fields = text.split()
        if not fields:
            continue
        token, rank = _parse_line(fields, f"{path}, line {line}")
        if token in ranks:
            where = line_of[ranks[token]]
            raise ValueError(f"{path}, line {line}: token {token!r} is already in line {where}")
        if rank in line_of:
            raise ValueError(f"{path}, line {line}: rank {rank} is already in line {line_of[rank]}")
        ranks[token] = rank
        line_of[rank] = line
    _check_holes(ranks, line_of, path)
    return ranks


def _parse_line(fields: list[bytes], where: str) -> tuple[bytes, int]:
    if len(fields) != 2 or not fields[1].isdigit():
        found = b" ".join(fields)[:60]
        raise ValueError(f"{where}: not base64, a space and a rank, but {found!r}")
    try:
        return binascii.a2b_base64(fields[0], strict_mode=True), int(fields[1])
    except binascii.Error as error:
        raise ValueError(f"{where}: {fields[0][:60]!r} is not base64 ({error})") from error


def _check_holes(ranks: dict[bytes, int], line_of: dict[int, int], path: Path) -> None:
    if not ranks:
        raise ValueError(f"{path}: holds no ranks")
    last = max(line_of)
    if last >= len(ranks):
        hole = next(rank for rank in range(last) if rank not in line_of)
        raise ValueError(
            f"{path}, line {line_of[last]}: rank {last} in a file of {len(ranks)} tokens: rank "
            f"{hole} is missing"
        )
    for byte in range(NUM_BYTES):
        if bytes([byte]) not in ranks:
            raise ValueError(
                f"{path}: byte 0x{byte:02x} is not among its {len(ranks)} tokens; all 256 must be"
            )
