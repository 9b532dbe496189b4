"""The engine's kernels for fp32 in host memory: ``host_kernels.c`` and its callers.

They replace most of a layer's torch operators, and read each expert's weights once
and in a row: ``packed`` lays them out in panels of 16 columns. Where there is no C compiler, for
other dtypes and on other devices, the engine computes the same in plain torch (``suit`` tells);
results differ by roundings alone. Threads are torch's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2 import host_library

PANEL = 16  # as in the C file
# Sums may be reordered and products contracted: tests hold the results to plain torch.
_FLAGS = (
    "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-ffp-contract=fast",
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there is no C compiler or it fails."""
    return host_library.compiled(Path(__file__).with_suffix(".c"), "engine", _FLAGS)


def suit(x: Tensor) -> bool:
    """Tell whether the kernels compute for tensors like ``x``."""
    return x.dtype is torch.float32 and x.is_cpu and library() is not None


def describe() -> str:
    """Return one line on what computes a step on the host."""
    if library() is None:
        return (
            "engine in plain torch, slower: no C compiler (gcc) or it failed, no "
            "folder to keep its library in ($XDG_CACHE_HOME), or MEGATRON_K2_HOST_KERNELS=off"
        )
    return "engine by compiled kernels (fp32 in host memory)"


def packed(weight: Tensor) -> Tensor:
    """Return weights [experts, out, in] as panels [experts, out / 16, in, 16], zero-padded."""
    experts, out, width = weight.shape
    whole = F.pad(weight, (0, 0, 0, -out % PANEL))
    return whole.view(experts, -1, PANEL, width).transpose(2, 3).contiguous()


def packed_gated(weight: Tensor) -> Tensor:
    """Return [experts, 2 ffn, in] as panels [experts, ffn / 16, 2, in, 16], gate before up."""
    gate, up = (packed(half) for half in weight.chunk(2, dim=1))
    return torch.stack((gate, up), 2)


def for_products(weight: Tensor) -> Tensor:
    """Return a matrix [out, in] as ``linear`` is fastest with it: panels [out / 16, in, 16]."""
    if not suit(weight) or weight.size(0) % PANEL:
        return weight
    return packed(weight[None])[0]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` [rows, out]; ``weight`` is a matrix or the panels of one."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    rows, width = x.shape
    columns = weight.size(0) * PANEL
    out = x.new_empty(rows, columns)
    _call(
        "linear", x, rows, x.stride(0), width, weight, columns, out, torch.get_num_threads()
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of ``x`` [rows, width], whose rows may be parts of wider ones."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    _call("rms_norm", x, rows, width, x.stride(0), weight, _real(eps), out)
    return out


def place(
    latents: Tensor, weight: Tensor | None, eps: float, turns: Tensor, positions: Tensor,
    places: Tensor, pages: Tensor, query: Tensor,
) -> None:  # fmt: skip
    """Write normed latents and rotated keys into ``pages``; rotate ``query`` in place.

    Args:
        latents: [rows, rank + rope], rows may be parts of wider ones.
        weight: of the latents' norm [rank]; None without one.
        eps: of the norm.
        turns: complex64 [positions, rope / 2].
        positions: int64 [rows].
        places: int64 [rows], rows of the cache.
        pages: [cache rows, rank + rope].
        query: contiguous [rows, heads, nope + rope].
    """
    rope = 2 * turns.size(1)
    rows, heads, width = query.shape
    rank = pages.size(1) - rope
    _call(
        "place", latents, rows, latents.stride(0), rank, rope, weight, _real(eps), turns,
        positions, places, pages, query, heads, width,
    )  # fmt: skip


def attend(
    query: Tensor, rank: int, pages: Tensor, places: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Return mixed latents [sequences, heads, rank] of one query a sequence.

    Args:
        query: in the latents' space, contiguous [sequences, heads, rank + rope].
        rank: ``kv_lora_rank``.
        pages: [cache rows, rank + rope].
        places: int64 [sequences, length], the cache rows of their tokens, padded.
        ends: int64 [sequences], how many are tokens.
        scale: of the scores.
    """
    sequences, heads, width = query.shape
    length = places.size(1)
    scores = query.new_empty(sequences, heads, length)
    out = query.new_empty(sequences, heads, rank)
    _call(
        "attend", query, sequences, heads, width, rank, pages, places, ends, length, _real(scale),
        scores, out, torch.get_num_threads(),
    )  # fmt: skip
    return out


def experts(
    x: Tensor, chosen: Tensor, probs: Tensor, first: int, fc1: Tensor, fc2: Tensor
) -> Tensor:
    """Return the weighted sum [rows, hidden] of each row's experts that are here.

    Args:
        x: [rows, hidden].
        chosen: int64 [rows, topk], global expert indices.
        probs: fp32 [rows, topk].
        first: global index of the first expert here.
        fc1: of ``packed_gated``.
        fc2: of ``packed``.
    """
    rows, hidden = x.shape
    topk, local, ffn = chosen.size(1), fc1.size(0), fc2.size(2)
    slots = rows * topk
    order = chosen.new_empty(slots + local + 1)
    activated = x.new_empty(slots, fc1.size(1) * PANEL)
    parts, out = x.new_empty(slots, hidden), x.new_empty(rows, hidden)
    _call(
        "experts", x.contiguous(), rows, hidden, chosen.contiguous(), probs.contiguous(), topk,
        first, local, fc1, fc2, ffn, order, order[slots:], activated, parts, out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _real(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def _call(name: str, *args: Any) -> None:
    """Call a kernel: tensors by address, whole numbers as long."""
    function = getattr(library(), name)
    function(*(_argument(one) for one in args))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else value
