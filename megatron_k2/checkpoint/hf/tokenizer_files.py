"""A run's tokenizer as the files that transformers looks for in a model folder.

A folder's tokenizer files are copied as they stand. A sentencepiece model is what transformers'
``LlamaTokenizer`` reads; its tokenizer_config.json is written here. transformers turns a control
piece's name in ordinary text into the piece, which sentencepiece never does; else ids are equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused

_KEPT = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tiktoken.model", "tokenization_kimi.py", "tool_declaration_ts.py",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
_IDS = ("bos", "eos", "pad")


def tokenizer_files(path: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    """Return the files of a tokenizer, and its bos, eos and pad ids by their names in config.json.

    Args:
        path: a sentencepiece ``.model``, a ``tiktoken.model``, or a folder with tokenizer files.

    Raises:
        ConversionRefused: there is no tokenizer.
    """
    if path.is_dir():
        found = {name: (path / name).read_bytes() for name in _KEPT if (path / name).is_file()}
    elif path.is_file():
        kept = path.name if path.name in _KEPT else _KEPT[0]  # or a sentencepiece model's
        found = {kept: path.read_bytes()}
    else:
        raise ConversionRefused(f"--tokenizer {path}: not there")
    if "tiktoken.model" in found:
        return found, _kimi_ids(path)
    if "tokenizer.model" in found:
        main = path / "tokenizer.model" if path.is_dir() else path
        config, ids = _sentencepiece(main)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        found.setdefault("tokenizer_config.json", text.encode())
        return found, ids
    if "tokenizer.json" not in found:
        raise ConversionRefused(
            f"--tokenizer {path}: no tokenizer.model, tiktoken.model or tokenizer.json there"
        )
    return found, {}


def _sentencepiece(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return tokenizer_config.json of a sentencepiece model, and its special ids."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ConversionRefused(f"--tokenizer {path}: no sentencepiece model ({error})") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    ids = {f"{name}_token_id": getattr(model, f"{name}_id")() for name in _IDS}
    ids = {name: token for name, token in ids.items() if token >= 0}
    pieces = {name.removesuffix("_id"): model.id_to_piece(token) for name, token in ids.items()}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": bool(proto.normalizer_spec.add_dummy_prefix),
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": model.id_to_piece(model.unk_id()),
        **pieces,
    }
    return config, ids


def _kimi_ids(path: Path) -> dict[str, int]:
    from megatron_k2.chat.tokenizer import KimiTokenizer

    tokenizer = KimiTokenizer(path)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in _IDS}
    return {name: token for name, token in ids.items() if token is not None}
