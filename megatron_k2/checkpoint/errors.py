"""What a conversion refuses, in the order in which it is found out."""

from __future__ import annotations


class ConversionRefused(ValueError):
    """The input or the request cannot be converted; every line names a file or a tensor."""


class CorruptSourceError(ConversionRefused):
    """A file of the source is not what its header or its checksum says."""


class ConversionInterrupted(RuntimeError):
    """A worker died; what is done is kept, and the same command goes on."""


def refuse(problems: list[str], what: str, limit: int = 10) -> None:
    """Raise for a list of problems, one line each, the first ``limit`` in full.

    Raises:
        ConversionRefused: the list is not empty.
    """
    if not problems:
        return
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    lines = "\n  ".join([*problems[:limit], *more])
    raise ConversionRefused(f"{what}:\n  {lines}")
