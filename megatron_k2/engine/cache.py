"""The cache of MLA's latents, in pages.

A token takes ``kv_lora_rank + rope`` numbers a layer, the normed latent and the one rotated key
that all heads share: in Kimi K2 576 instead of the 64 x (192 + 128) of expanded keys and values.
Pages of ``BLOCK_TOKENS`` tokens are handed out from a free list, so that a growing sequence copies
nothing and a finished one leaves no hole (PagedAttention, arXiv 2309.06180). Block 0 is never
handed out: tables are padded with it. A block can have several owners (prefixes.py) and is free
when the last has given it back.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 16
"""As vLLM's default. Of 16, 32 and 64 the reading of a page table costs the same within noise
(two cores, 32 sequences of 128 and 512 tokens); small pages waste least."""


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class LatentCache:
    """Pages of latents for all layers of a model.

    Attributes:
        pages: a tensor a layer, [blocks x BLOCK_TOKENS, width]; zero where nothing was written, so
            that what a mask hides is never NaN.
    """

    def __init__(
        self, num_layers: int, width: int, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate room for ``num_tokens`` tokens, rounded up to blocks.

        Args:
            num_layers: layers of the model.
            width: numbers of a token and layer, ``kv_lora_rank + qk_pos_emb_head_dim``.
            num_tokens: over all sequences.
            dtype: of the model's weights.
            device: of the model.
        """
        self.num_blocks = blocks_for(num_tokens)
        rows = (self.num_blocks + 1) * BLOCK_TOKENS
        self.pages: list[Tensor] = [
            torch.zeros(rows, width, dtype=dtype, device=device) for _ in range(num_layers)
        ]
        self._free = list(range(self.num_blocks, 0, -1))
        self._owners = [0] * (self.num_blocks + 1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes over all layers."""
        return sum(page.shape[1] * page.element_size() for page in self.pages)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_owners(self, block: int) -> int:
        """How many hold a block."""
        return self._owners[block]

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` blocks; the caller has seen that so many are free."""
        assert count <= len(self._free)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> list[int]:
        """Add an owner to blocks that somebody holds; return them."""
        for block in blocks:
            assert self._owners[block]
            self._owners[block] += 1
        return list(blocks)

    def copy(self, source: int, target: int) -> None:
        """Copy a block's latents into another, in every layer."""
        rows = [slice(one * BLOCK_TOKENS, (one + 1) * BLOCK_TOKENS) for one in (source, target)]
        for page in self.pages:
            page[rows[1]] = page[rows[0]]

    def give_back(self, blocks: list[int]) -> None:
        """Leave blocks, free those that nobody else holds, and empty the list."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
        blocks.clear()
