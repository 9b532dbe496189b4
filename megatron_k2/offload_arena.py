"""A second memory for offloaded activations on the host: mapped temporary files without a name.

On a GPU, offloading moves activations into pinned host memory. On a CPU the host memory is where
they are already, so they go to files instead: out of the process's anonymous memory, into pages
that Linux may write back and drop. A file is unlinked before it is used and gone when its last
mapping is, however the process ends. Blocks that are given back serve later requests of about
their size, because the page faults of a fresh file cost more than the copy. One mapping a block:
Linux allows 65,530 a process (``vm.max_map_count``). Beside it, the checks of what to offload
against what to recompute and against the smallest size. No Megatron import.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_VARIABLE = "K2_OFFLOAD_FOLDER"
"""Environment variable that ``--k2-offload-folder`` sets; unset means the temporary folder."""

_LATER = {"attn_norm", "attn_proj"}
"""Groups that upstream closes after core attention's output, in every layer (mlp_norm: not in dense
layers of Transformer Engine, whose first linear holds the norm)."""

_STEPS = 8
"""Block sizes between two powers of two: at most 1/8 of a block is unused."""


def offload_folder() -> Path:
    """Return the folder of the files: ``$K2_OFFLOAD_FOLDER``, or the system's temporary one."""
    return Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())


def check_folder(folder: str | Path) -> None:
    """Check that files can be made in a folder.

    Raises:
        ValueError: they cannot; the message names the flag.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
    except OSError as error:
        raise ValueError(
            f"--k2-offload-folder {folder}: no file can be made there ({error.strerror}); name an "
            f"existing folder with room, or leave the flag out for {tempfile.gettempdir()}"
        ) from error


def check_offload_modules(
    offload: Collection[str], granularity: str | None, recompute: Collection[str]
) -> None:
    """Check what is offloaded against what is recomputed, on any device.

    Args:
        offload: ``--offload-modules``.
        granularity: ``--recompute-granularity``.
        recompute: ``--recompute-modules``, read where the granularity is selective.

    Raises:
        ValueError: upstream would fail in the backward pass, or offload nothing.
    """
    if not offload:
        raise ValueError(
            "--fine-grained-activation-offloading needs --offload-modules: attn_norm, qkv_linear, "
            "core_attn, attn_proj, mlp_norm, expert_fc1, moe_act"
        )
    if granularity == "full":
        raise ValueError(
            "--fine-grained-activation-offloading frees the inputs of layers, which "
            "--recompute-granularity full needs again; allowed: selective, or "
            "--no-fine-grained-activation-offloading"
        )
    if granularity != "selective":
        return
    if "core_attn" in offload and "core_attn" in recompute:
        raise ValueError(
            "--offload-modules core_attn: --recompute-modules core_attn keeps nothing of it that "
            "could be offloaded; name it in one of the two"
        )
    # The up-projections are recomputed while attention's output has its gradient, and upstream
    # learns which microbatch that belongs to from a later group of the same layer.
    if "qkv_linear" in offload and "mla_up_proj" in recompute and not _LATER & set(offload):
        raise ValueError(
            f"--offload-modules {' '.join(offload)} with --recompute-modules mla_up_proj: "
            f"qkv_linear needs one of {', '.join(sorted(_LATER))} beside it"
        )


def too_small_to_offload(args: Any) -> str:
    """Return a sentence on the modules of which nothing is offloaded, '' if there are none.

    Upstream leaves a tensor where it is that has fewer elements than
    ``--min-offloaded-tensor-size`` (1,048,576 by default), and says nothing.

    Args:
        args: validated arguments; sizes are those of a microbatch on one rank, experts in balance.
    """
    sizes = _largest_tensors(args)
    kept = {m: sizes[m] for m in args.offload_modules or () if m in sizes}
    kept = {m: size for m, size in kept.items() if size < args.min_offloaded_tensor_size}
    if not kept:
        return ""
    return (
        f"--offload-modules {' '.join(kept)}: not offloaded, because their largest tensors, of "
        f"{', '.join(f'{size:,}' for size in kept.values())} elements, are below "
        f"--min-offloaded-tensor-size {args.min_offloaded_tensor_size:,}; give a smaller one"
    )


def _largest_tensors(args: Any) -> dict[str, int]:
    """Return the elements of the largest tensor that each module to offload keeps."""
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    tp = args.tensor_model_parallel_size
    hidden = tokens * args.hidden_size // (tp if args.sequence_parallel else 1)
    if args.multi_latent_attention:
        query, value = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    else:
        query = value = args.kv_channels
    heads = tokens * args.num_attention_heads // tp
    found = dict.fromkeys(("attn_norm", "mlp_norm"), hidden)
    found |= {
        "qkv_linear": max(hidden, heads * query), "core_attn": heads * max(query, value),
        "attn_proj": heads * value,
    }  # fmt: skip
    if args.num_experts:
        etp = args.expert_tensor_parallel_size or tp
        routed = tokens * args.moe_router_topk * etp // tp
        width = (args.moe_ffn_hidden_size or args.ffn_hidden_size) * (2 if args.swiglu else 1)
        found["moe_act"] = routed * width // etp
        found["expert_fc1"] = routed * max(args.hidden_size, width // etp)
    return found


def block_bytes(num_bytes: int) -> int:
    """Return the size of the block that serves a request: whole pages, few different sizes."""
    step = max(mmap.PAGESIZE, (1 << max(num_bytes - 1, 0).bit_length()) // (2 * _STEPS))
    return -(-max(num_bytes, 1) // step) * step


class OffloadArena:
    """Blocks of mapped files, lent out as tensors.

    Args:
        folder: where the files are made.

    Attributes:
        mapped_bytes: of the files that were made and are lent out or free.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self._free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        self.mapped_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that nobody holds."""
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor in the arena.

        Raises:
            RuntimeError: the folder has no room left.
        """
        count = math.prod(shape)
        size = block_bytes(count * dtype.itemsize)
        block = self._free[size].pop() if self._free[size] else self._map(size)
        return torch.empty(0, dtype=dtype).set_(block)[:count].view(tuple(shape))

    def give_back(self, tensor: Tensor) -> None:
        """Take a tensor's block back; the tensor must not be read any more."""
        block = tensor.untyped_storage()
        self._free[block.nbytes()].append(block)

    def _map(self, size: int) -> torch.UntypedStorage:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Without a reservation, a full disk would be a bus error at the first write.
                os.posix_fallocate(file.fileno(), 0, size)
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise RuntimeError(
                f"--k2-offload-folder {self.folder}: no room for {size} bytes of offloaded "
                f"activations beside {self.mapped_bytes} ({error.strerror}); name a larger folder"
            ) from error
        self.mapped_bytes += size
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
