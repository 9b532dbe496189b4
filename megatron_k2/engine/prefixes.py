"""One reading of a prompt for all who ask it at the same time: the answers of a group.

Pages full of a prompt's tokens are shared and counted (cache.py); the page that the prompt ends in
is copied, because the answer goes on in it. A prompt is read up to its last token and that one is a
decoding row, in whoever read it and in whoever shares it: both compute the same way, so that they
differ by no more than a decoding row does in another batch.
Shared are equal prompts of running requests (PagedAttention, arXiv 2309.06180, section 4.4); pages
of requests that have ended are kept.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_k2.engine.cache import BLOCK_TOKENS, LatentCache


class Reader(Protocol):
    """What is needed of a sequence under way: its prompt, cached tokens and blocks."""

    cached: int
    blocks: list[int]

    @property
    def prompt(self) -> Sequence[int]:
        """Ids of the prompt."""


class SharedPrompts:
    """Who holds which prompt in the cache.

    Attributes:
        num_tokens: prompt tokens that were not computed because another had them.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._holders: dict[tuple[int, ...], Reader] = {}
        self.num_tokens = 0

    def begin(self, reader: Reader) -> bool:
        """Give a reader that has computed nothing what another has of its prompt.

        Returns:
            False if it should wait: another is reading the same prompt.
        """
        prompt = tuple(reader.prompt)
        holder = self._holders.get(prompt)
        if holder is not None and holder is not reader:
            if holder.cached < len(prompt) - 1:
                return False
            self._share(holder, reader, len(prompt) - 1)
        if len(prompt) > 1:
            self._holders[prompt] = reader  # the youngest stays longest
        return True

    def forget(self, reader: Reader) -> None:
        """Note that a reader's blocks are going."""
        prompt = tuple(reader.prompt)
        if self._holders.get(prompt) is reader:
            del self._holders[prompt]

    def forget_all(self) -> None:
        """Note new weights: what is cached is not what a new request would get."""
        self._holders.clear()

    def _share(self, holder: Reader, reader: Reader, num_tokens: int) -> None:
        whole, rest = divmod(num_tokens, BLOCK_TOKENS)
        own = reader.blocks[:whole]
        self._cache.give_back(own)
        reader.blocks[:whole] = self._cache.share(holder.blocks[:whole])
        if rest:
            self._cache.copy(holder.blocks[whole], reader.blocks[whole])
        reader.cached = num_tokens
        self.num_tokens += num_tokens
