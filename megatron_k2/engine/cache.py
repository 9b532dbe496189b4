"""The cache of MLA's latents, in pages.

A token takes ``kv_lora_rank + rope`` numbers a layer, the normed latent and the one rotated key
that all heads share: in Kimi K2 576 instead of the 64 x (192 + 128) of expanded keys and values.
Pages of ``BLOCK_TOKENS`` tokens are handed out from a free list, so that a growing sequence copies
nothing and a finished one leaves no hole (PagedAttention, arXiv 2309.06180). Block 0 is never
handed out: tables are padded with it. Left out: sharing pages between equal prefixes.
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

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes over all layers."""
        return sum(page.shape[1] * page.element_size() for page in self.pages)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` blocks; the caller has seen that so many are free."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Free blocks and empty the list of who held them."""
        self._free += reversed(blocks)
        blocks.clear()
