"""Messages between the host and a keeper: a JSON header, then blobs of bytes.

Four bytes of length, the header, then the blobs, whose lengths the header names. JSON, so that
nothing that a keeper sends can run in the host.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 16 << 20  # argv, environment and paths; contents are blobs


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Return a message."""
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([LENGTH.pack(len(text)), text, *blobs])


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """Read a message from a blocking socket.

    Raises:
        EOFError: the other side is gone.
        ValueError: the header is longer than any of ours.
    """
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES}")
    header = json.loads(_exactly(sock, length))
    return header, [_exactly(sock, size) for size in header.pop("blobs")]


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header and blobs of a whole message.

    Raises:
        ValueError: it is none.
    """
    try:
        (length,) = LENGTH.unpack_from(data)
        at = LENGTH.size + length
        header = json.loads(data[LENGTH.size : at])
        blobs = []
        for size in header.pop("blobs"):
            blobs.append(data[at : at + size])
            at += size
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no message: {error}") from None
    if at != len(data):
        raise ValueError(f"a message of {at} bytes came as {len(data)}")
    return header, blobs


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other side closed the connection")
        data += piece
    return bytes(data)
