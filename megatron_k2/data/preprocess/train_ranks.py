"""A rank file as Kimi's ``tiktoken.model`` is one, learnt from text: for small models.

Pieces are cut by Kimi's own pattern; the merges are those of ``tokenizers``' trainer. Its ids in
their order are the ranks, the 256 bytes first, as tiktoken needs them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from megatron_k2.chat.special_tokens import NUM_SPECIAL
from megatron_k2.chat.tokenizer import PATTERN

NUM_BYTES = 256


def train_ranks(texts: Iterator[str], vocab_size: int) -> bytes:
    """Return a rank file.

    Args:
        texts: to learn from; the same texts give the same bytes.
        vocab_size: ids of the tokenizer, the 256 special ones and the 256 bytes included.

    Raises:
        ValueError: the vocabulary is too small, or the text too little for it.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    num_ranks = vocab_size - NUM_SPECIAL
    if num_ranks < NUM_BYTES:
        raise ValueError(f"--vocab-size {vocab_size} must be at least {NUM_SPECIAL + NUM_BYTES}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    letters = _byte_of_letter()
    names = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    merged = [bytes(letters[letter] for letter in name) for name, _ in names if len(name) > 1]
    ranks = [bytes([byte]) for byte in range(NUM_BYTES)] + merged
    if len(ranks) < num_ranks:
        raise ValueError(
            f"--vocab-size {vocab_size}: the text gives only {len(ranks) + NUM_SPECIAL}; give "
            "more, or ask for less"
        )
    lines = (base64.b64encode(name) + b" %d\n" % rank for rank, name in enumerate(ranks))
    return b"".join(lines)


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}
