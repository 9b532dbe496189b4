"""Latents of requests that have ended, for requests that begin with the same tokens.

The next turn of a dialogue asks again for what the cache held a moment ago, and so does an episode
that was paused. Full pages of an ended request therefore stay in the cache until their room is
wanted, least recently used first (automatic prefix caching, as in vLLM). A page is known by its
tokens and the page before it, so that equal beginnings are held once, however they came about.

A page also belongs to the weights that its request began under. A request gets pages of the
weights that it is admitted under; one that is continued under new weights may have older ones
(``Request.old_latents``), as a request under way has when weights change beneath it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from megatron_k2.engine.cache import BLOCK_TOKENS, LatentCache

OLD_WEIGHTS = 64  # changes of weights that pages are looked for behind the newest

Key = tuple[int, tuple[int, ...]]  # the page before it, or its weights; its tokens


@dataclass(frozen=True)
class Page:
    """A page that is kept: its number, which is never used again, and its block."""

    number: int
    block: int


class KeptPages:
    """The pages of ended requests, least recently used first.

    Attributes:
        weights: counts changes of weights; what is read now belongs to it.
        num_tokens: tokens that were not computed because their pages were kept.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._pages: OrderedDict[Key, Page] = OrderedDict()
        self._numbers = count()
        self._known: deque[int] = deque([0], maxlen=OLD_WEIGHTS)  # newest first
        self.weights = self.num_tokens = 0

    def __len__(self) -> int:
        """Pages that are kept."""
        return len(self._pages)

    def keep(self, tokens: Sequence[int], blocks: Sequence[int], weights: int) -> None:
        """Keep the full pages of a request that ends; its own hold on them is the caller's.

        Args:
            tokens: whose latents are in the cache, from the first.
            blocks: that hold them.
            weights: ``weights`` when the first of them was read.
        """
        keys: list[Key] = []
        before = -1 - weights
        for words, block in zip(_pages_of(tokens, len(tokens)), blocks, strict=False):
            key = (before, words)
            if key not in self._pages:
                self._pages[key] = Page(next(self._numbers), *self._cache.share([block]))
            before = self._pages[key].number
            keys.append(key)
        for key in reversed(keys):  # a page without the one before it is of no use: later ones go
            self._pages.move_to_end(key)

    def find(self, tokens: Sequence[int], is_old_welcome: bool) -> tuple[list[int], int]:
        """Return blocks of a prompt's beginning, the caller a new owner, and their ``weights``.

        Args:
            tokens: of the prompt; the last one is always left to be computed.
            is_old_welcome: take what older weights have read, where that is more.
        """
        found: list[Key] = []
        weights = self.weights
        for at in self._known if is_old_welcome else (self.weights,):
            keys = list(self._chain(tokens, at))
            if len(keys) > len(found):
                found, weights = keys, at
        for key in reversed(found):
            self._pages.move_to_end(key)
        return self._cache.share([self._pages[key].block for key in found]), weights

    def make_room(self, num_blocks: int) -> bool:
        """Let pages go until so many blocks are free; none where that would not be enough."""
        missing = num_blocks - self._cache.num_free
        if missing <= 0:
            return True
        owners, pages = self._cache.num_owners, self._pages.items()
        ours = list(islice((key for key, page in pages if owners(page.block) == 1), missing))
        if len(ours) < missing:
            return False
        for key in ours:
            self._cache.give_back([self._pages.pop(key).block])
        return True

    def forget_all(self) -> None:
        """Let every page go."""
        self._cache.give_back([page.block for page in self._pages.values()])
        self._pages.clear()

    def new_weights(self) -> None:
        """Note that what is read from now on is read by other weights."""
        self.weights += 1
        self._known.appendleft(self.weights)

    def _chain(self, tokens: Sequence[int], weights: int) -> Iterator[Key]:
        before = -1 - weights
        for words in _pages_of(tokens, len(tokens) - 1):
            page = self._pages.get((before, words))
            if page is None:
                return
            yield before, words
            before = page.number


def _pages_of(tokens: Sequence[int], end: int) -> Iterator[tuple[int, ...]]:
    """Yield the tokens of each full page before ``end``."""
    for start in range(0, end - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        yield tuple(tokens[start : start + BLOCK_TOKENS])
