"""A Hugging Face tokenizer.json, without transformers: ids as Megatron's ``HuggingFaceTokenizer``.

Added tokens that are not white space count as control tokens, whether the file calls them special
or not ("<think>" is not, in some). They stay text: the file is read with all of them special and
``encode_special_tokens`` on. ``--control-tokens ids`` leaves the file as it is, which is what stock
Megatron does to every corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.data.preprocess.fast_engine import Checked, Encode, fast_engine, unpacked
from megatron_k2.data.preprocess.optional import require

_FILE, _CONFIG, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


class HuggingFaceEncoder:
    """See ``encoders.Encoder``."""

    def __init__(
        self, model: str, engine: str, control_tokens: str, add_special_tokens: bool
    ) -> None:
        tokenizers = require("tokenizers", "--tokenizer-type HuggingFaceTokenizer")
        path = Path(model)
        path = path / _FILE if path.is_dir() else path
        data, added = _read(path, stays_text=control_tokens == "text")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"--tokenizer-model {path}: not a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = control_tokens == "text"
        self._add_special_tokens = add_special_tokens
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = _read_config(path)
        self._check(path, config)
        self.eod = self._find_eod(config)
        settings = f"{data} {self.eod} {control_tokens} {add_special_tokens}"
        self.digest = hashlib.sha256(settings.encode()).hexdigest()
        self.control_names: Mapping[str, int] = added
        self.is_control: np.ndarray | None = None
        if control_tokens == "text":
            self.is_control = self._forbidden(added)
        self._data, self._engine = data, engine
        self._stays_text = control_tokens == "text"

    @cached_property
    def _encode(self) -> Encode:
        fast = fast_engine(lambda module: module.Tokenizer.from_json_str(self._data), self._engine)
        if fast is None:
            return self._by_tokenizers
        flags = self._add_special_tokens, self._stays_text
        return Checked(
            lambda texts: unpacked(fast.encode_batch_flat(texts, *flags)),
            lambda text: self._by_tokenizers([text])[0].tolist(),
            "tokenizers",
        )

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts and their numbers."""
        return self._encode(texts)

    def _by_tokenizers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=self._add_special_tokens
        )
        lists = [encoding.ids for encoding in found]
        counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        ids = np.fromiter(chain.from_iterable(lists), dtype=np.uint32, count=int(counts.sum()))
        return ids, counts

    def _find_eod(self, config: Mapping[str, Any]) -> int | None:
        """Return ``eos_token``, or ``sep_token`` where there is none, as Megatron does."""
        for role in ("eos_token", "sep_token"):
            if (token := _content(config.get(role))) is not None:
                return self._tokenizer.token_to_id(token)
        return None

    def _check(self, path: Path, config: Mapping[str, Any]) -> None:
        """Refuse a tokenizer.json that transformers would change by the files beside it."""
        problems = []
        for role in ("bos", "eos"):
            wanted, token = config.get(f"add_{role}_token"), _content(config.get(f"{role}_token"))
            if wanted is None or token is None or not self._add_special_tokens:
                continue
            found = self._tokenizer.token_to_id(token) in self._tokenizer.encode("").ids
            if found != wanted:
                problems.append(f"add_{role}_token is {wanted} there, and the template's {found}")
        added = config.get("added_tokens_decoder") or {}
        for token in filter(None, map(_content, added.values())):
            if self._tokenizer.token_to_id(token) is None:
                problems.append(f"{token!r} of added_tokens_decoder is not in it")
        if problems:
            raise ValueError(
                f"--tokenizer-model {path}: does not agree with {_CONFIG}: {'; '.join(problems)}. "
                "Save it anew by transformers: AutoTokenizer.from_pretrained(...).save_pretrained()"
            )

    def _forbidden(self, added: Mapping[str, int]) -> np.ndarray:
        """Return the control ids, but for those the template and unknown words give."""
        found = np.zeros(max([self.vocab_size, *(token + 1 for token in added.values())]), bool)
        found[list(added.values())] = True
        found[self._tokenizer.encode("", add_special_tokens=self._add_special_tokens).ids] = False
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is not None and (token := self._tokenizer.token_to_id(unknown)) is not None:
            found[token] = False
        return found


def _content(token: Any) -> str | None:
    """Return the text of a token, which is a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_config(path: Path) -> dict[str, Any]:
    """Return what the files beside tokenizer.json say; the later one wins."""
    config: dict[str, Any] = {}
    for name in (_MAP, _CONFIG):
        beside = path.with_name(name)
        if beside.is_file():
            try:
                content = json.loads(beside.read_text(encoding="utf-8"))
                config |= {key: value for key, value in content.items() if value is not None}
            except (ValueError, AttributeError) as error:
                raise ValueError(f"--tokenizer-model {beside}: no JSON object ({error})") from error
    return config


def _read(path: Path, stays_text: bool) -> tuple[str, dict[str, int]]:
    """Return the file's text, with every control token special, and the control tokens."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        added = {
            token["content"]: int(token["id"])
            for token in content.get("added_tokens", ())
            if token["content"].strip()
        }
    except OSError as error:
        raise ValueError(f"--tokenizer-model {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:  # its repr is the whole file
        raise ValueError(
            f"--tokenizer-model {path}: not a tokenizer.json but a binary file; a sentencepiece "
            "model needs --tokenizer-type SentencePieceTokenizer"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--tokenizer-model {path}: not a tokenizer.json ({error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--tokenizer-model {path}: not a tokenizer.json: an object whose added_tokens have "
            "content and id"
        ) from error
    if stays_text:
        for token in content.get("added_tokens", ()):
            token["special"] = bool(token["content"].strip())
    return json.dumps(content), added
