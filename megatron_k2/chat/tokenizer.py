"""Kimi's tokenizer: ``tiktoken.model`` and 256 special ids, loaded directly and exactly.

The rules are those of ``tokenization_kimi.py`` in Moonshot's releases (read in the copy that
github.com/troy12x/quasar-kimi carries): byte-pair encoding by rank over the pieces of one regular
expression; before it, text is cut into slices of 400,000 characters and each slice into pieces
without more than 25,000 white or 25,000 other characters in a row; after the ranks come 256
special ids, named by ``added_tokens_decoder``, the rest ``<|reserved_token_ID|>``. transformers'
automatic conversion keeps neither the cuts nor all special ids and is never used.

Two differences, both on purpose. A control token's name in ordinary text stays text unless the
caller asks for control tokens: a document must not be able to end itself. And K2's class makes 258
special ids, so that its ``vocab_size`` is 163,842 where config.json says 163,840: the last two
have no row in the embedding (the class of K2.5 and K3 makes 256). Here there are 256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_k2.chat.ranks import parse_ranks, read_bytes
from megatron_k2.chat.special_tokens import (
    CONFIG_FILE,
    NUM_SPECIAL,
    read_config,
    role_ids,
    special_tokens,
    spoken_tokens,
)

if TYPE_CHECKING:
    import tiktoken

RANK_FILE = "tiktoken.model"
MAX_SLICE_CHARS = 400_000  # TIKTOKEN_MAX_ENCODE_CHARS
MAX_RUN_CHARS = 25_000  # MAX_NO_WHITESPACES_CHARS

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""``pat_str``, character for character; tests/unit/chat checks it by the release's SHA-256."""


def presplit(text: str) -> Iterator[str]:
    """Yield the pieces that are encoded one by one; joined they are the text.

    A faster encoder of the same vocabulary gives the same ids if it gets these pieces.
    """
    for start in range(0, len(text), MAX_SLICE_CHARS):
        yield from _cut_runs(text[start : start + MAX_SLICE_CHARS], MAX_RUN_CHARS)


def _cut_runs(text: str, limit: int) -> Iterator[str]:
    """Cut after every ``limit`` characters in a row that are all white or all not.

    Looks at windows of ``limit + 1`` characters with the interpreter's own string functions: two
    windows advance by more than ``limit``, so a document costs no loop over characters.
    """
    begin = run = 0  # of the piece, of the run of equal characters at hand
    while run + limit < len(text):
        window = text[run : run + limit + 1]
        if window[-1].isspace():
            last = len(window) - len(window.rstrip())
        else:
            last = len(window.rsplit(maxsplit=1)[-1])
        if last <= limit:
            run += limit + 1 - last
        else:
            run += limit
            yield text[begin:run]
            begin = run
    yield text[begin:]


def scalar_text(text: str) -> str:
    """Return a text without lone surrogates, as the tokenizer reads it: U+FFFD in their place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class KimiTokenizer:
    """Text to ids and back.

    Attributes:
        path: the rank file.
        config: tokenizer_config.json, empty without one.
        num_ranks: ordinary tokens, ids ``[0, num_ranks)``; 163,584 for Kimi K2.
        vocab_size: with the 256 special ids; 163,840 for Kimi K2.
        special_tokens: name -> id of all 256.
        bos_id, eos_id, unk_id, pad_id: by the names that tokenizer_config.json gives them.
        digest: SHA-256 of the rank file and the special ids, for caches of tokenised data.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a tokenizer.

        Args:
            path: a folder with ``tiktoken.model`` and, where special ids are named,
                ``tokenizer_config.json``; or a rank file of any name. A file called
                ``tiktoken.model`` is taken with the ``tokenizer_config.json`` beside it.

        Raises:
            ValueError: a file is missing or wrong; the message names it, and the line.
        """
        path = Path(path)
        self.path = path / RANK_FILE if path.is_dir() else path
        data = read_bytes(self.path)
        self._ranks = parse_ranks(data, self.path)
        self.num_ranks = len(self._ranks)
        self.vocab_size = self.num_ranks + NUM_SPECIAL
        beside = self.path.with_name(CONFIG_FILE)
        self.config = read_config(beside) if self.path.name == RANK_FILE else {}
        self.special_tokens = special_tokens(self.config, self.num_ranks)
        self._spoken = spoken_tokens(self.config, self.special_tokens)
        ids = role_ids(self.config, self.special_tokens)
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.unk_id, self.pad_id = ids["unk"], ids["pad"]
        names = json.dumps([self.special_tokens, ids]).encode()
        self.digest = hashlib.sha256(hashlib.sha256(data).digest() + names).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            name=self.path.name,
            pat_str=PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens=self.special_tokens,
        )

    def encode(self, text: str, control_tokens: bool = False) -> list[int]:
        """Return the ids of a text; no BOS or EOS is added.

        Args:
            text: any string; lone surrogates become U+FFFD, as tiktoken has it.
            control_tokens: turn names of special ids in the text into these ids, as the released
                class does by default. Only for text that this program has written itself, such as
                a rendered chat template.
        """
        if len(text) <= MAX_RUN_CHARS and not control_tokens:  # most texts: nothing to cut
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for piece in presplit(text):
            if control_tokens:
                ids += self._encoding.encode(piece, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave special ids out instead of writing their names; the marks of tool
                calls stay, as with transformers.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        tokens = [int(token) for token in ids]
        for token in {min(tokens, default=0), max(tokens, default=0)}:
            self._check(token)
        if skip_special:
            spoken = self._spoken
            tokens = [token for token in tokens if token < self.num_ranks or token in spoken]
        return self._encoding.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids that are in the vocabulary; of special ids, their names."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token; of a special id, its name.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        self._check(token)
        return self._encoding.decode_single_token_bytes(token)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")

    def special_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: none has that name.
        """
        if name not in self.special_tokens:
            raise ValueError(f"{self.path} has no special token {name!r}")
        return self.special_tokens[name]
