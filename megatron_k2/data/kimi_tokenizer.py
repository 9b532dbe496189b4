"""``--tokenizer-type KimiTiktokenTokenizer``: Kimi's tokenizer as Megatron's own kind of object.

``--tokenizer-model`` is a release's folder or a rank file (megatron_k2/chat/tokenizer.py). Text
never becomes a control token, except that of a chat template. ``eod`` is the ``eos_token`` of
tokenizer_config.json: ``[EOS]``, with which Kimi K2's config.json ends documents; an answer ends
with ``<|im_end|>``. Caches of datasets depend on the files' content, not on their place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megatron.core.tokenizers.text.libraries.abstract_tokenizer import (
    MegatronTokenizerTextAbstract,
)
from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

from megatron_k2.chat.release_template import read_template, render_template, sorted_keys
from megatron_k2.chat.special_tokens import CONFIG_FILE, CONTROL_TOKENS, ROLES
from megatron_k2.chat.tokenizer import RANK_FILE, KimiTokenizer

TOKENIZER_TYPE = "KimiTiktokenTokenizer"
LIBRARY = "kimi-tiktoken"


class KimiTiktokenTokenizer(MegatronTokenizerTextAbstract):
    """What Megatron calls a tokenizer library."""

    def __init__(self, path: str, chat_template: str | None = None) -> None:
        """Load a tokenizer.

        Args:
            path: see ``KimiTokenizer``.
            chat_template: a jinja template in place of the folder's.
        """
        self.kimi = KimiTokenizer(path)
        if chat_template is None and self.kimi.path.name == RANK_FILE:
            chat_template = read_template(self.kimi.path.parent, self.kimi.config)
        self.chat_template = chat_template

    @property
    def bos_id(self) -> int:
        """``bos_token`` of tokenizer_config.json, ``[BOS]``."""
        return self.kimi.bos_id

    @property
    def eos_id(self) -> int:
        """``eos_token`` of tokenizer_config.json, ``[EOS]``; Megatron's ``eod`` too."""
        return self.kimi.eos_id

    @property
    def unk_id(self) -> int:
        """``[UNK]``."""
        return self.kimi.unk_id

    @property
    def pad_id(self) -> int:
        """``[PAD]``, which no document holds."""
        return self.kimi.pad_id

    @property
    def vocab_size(self) -> int:
        """Ranks and the 256 special ids."""
        return self.kimi.vocab_size

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id; bytes as in ``_spell``. A special id wins over an equal ordinary token."""
        return {self._spell(token): token for token in range(self.vocab_size)}

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token."""
        return {token: self._spell(token) for token in range(self.vocab_size)}

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Kimi's control tokens, without bos, eos, unk and pad."""
        known = self.kimi.special_tokens
        return [known[name] for name in CONTROL_TOKENS if name in known and name not in _ROLE_NAMES]

    def text_to_ids(self, text: str) -> list[int]:
        """Return the ids of a text, without control tokens."""
        return self.kimi.encode(text)

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return self.kimi.decode(ids, skip_special=remove_special_tokens)

    def text_to_tokens(self, text: str) -> list[str]:
        """Return a text's tokens; bytes as in ``_spell``."""
        return self.ids_to_tokens(self.text_to_ids(text))

    def tokens_to_text(self, tokens: list[str]) -> str:
        """Return the text of tokens."""
        return self.ids_to_text(self.tokens_to_ids(tokens))

    def tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Return the ids of tokens; an unknown one is ``[UNK]``."""
        return [self.vocab.get(token, self.unk_id) for token in tokens]

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids."""
        return [self._spell(int(token)) for token in ids]

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Return where in ``text`` each token begins, in characters; within one, its place."""
        found, length = [], 0
        for token in ids:
            data = self.kimi.token_bytes(int(token))
            starts = sum(byte & 0xC0 != 0x80 for byte in data)  # not a byte within a character
            found.append(max(0, length - (data[0] & 0xC0 == 0x80)))
            length += starts
        return found

    def add_special_tokens(self, special_tokens: Any = None) -> None:
        """Refuse: the 256 special ids have rows in the embedding, others have none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{TOKENIZER_TYPE} has no room for more special tokens; name reserved ids in "
            f"added_tokens_decoder of {CONFIG_FILE}"
        )

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        chat_template: str,
        tokenize: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """Render a dialogue by a jinja template, as the release does.

        Control tokens are recognised in the whole text, in what messages say too: for training
        data use ``megatron_k2.chat.template``, which keeps the two apart.

        Args:
            conversation: messages.
            chat_template: its text.
            tokenize: return ids, not text.
            truncation: keep the first ``max_length`` ids.
            max_length: see ``truncation``.
            add_generation_prompt: end with the head of the answer.
            tools: declarations; their keys are sorted, as the released class does.
            variables: more of the template's.

        Raises:
            ValueError: the template does not render.
        """
        text = render_template(
            chat_template,
            conversation,
            tools=sorted_keys(tools),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        if not tokenize:
            return text
        ids = self.kimi.encode(text, control_tokens=True)
        return ids[:max_length] if truncation else ids

    def _spell(self, token: int) -> str:
        """Return a token with each byte as one printable character; exact, unlike its text."""
        return "".join(_CHARACTERS[byte] for byte in self.kimi.token_bytes(token))


class KimiMegatronTokenizer(MegatronTokenizerText):
    """What ``get_tokenizer()`` returns."""

    def __init__(self, path: str, chat_template: str | None = None) -> None:
        """Load a tokenizer; see ``KimiTiktokenTokenizer``."""
        config = {
            "library": LIBRARY,
            "class_name": type(self).__name__,
            "class_path": type(self).__module__,
        }
        super().__init__(path, config, chat_template=chat_template)

    def _restore_model(self, **kwargs: Any) -> KimiTiktokenTokenizer:
        return KimiTiktokenTokenizer(self.path, **kwargs)

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What caches of datasets are keyed by: the content of the files, not their place."""
        return OrderedDict(
            {"class": f"{LIBRARY}.{type(self).__name__}", "sha256": self._tokenizer.kimi.digest}
        )


def build(args: Any) -> KimiMegatronTokenizer:
    """Return the tokenizer of a command line and set the padded vocabulary.

    Args:
        args: Megatron's, with ``tokenizer_model``.

    Raises:
        UsageError: there is no such tokenizer.
    """
    from megatron.core.tokenizers.utils import build_tokenizer

    from megatron_k2.inputs import UsageError

    if not args.tokenizer_model:
        raise UsageError("give --tokenizer-model a release's folder or a rank file")
    try:
        tokenizer = KimiMegatronTokenizer(args.tokenizer_model, chat_template=args.chat_template)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.pad_vocab_size:
        build_tokenizer._set_padded_vocab_size(args, tokenizer)
    return tokenizer


def byte_characters() -> list[str]:
    """Return a printable character for each byte, those of GPT-2's byte-level alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = byte_characters()
_ROLE_NAMES = frozenset(ROLES.values())
