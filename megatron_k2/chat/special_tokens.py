"""Names of the 256 special ids that come after the ranks, from tokenizer_config.json.

``added_tokens_decoder`` names some of them; the rest are ``<|reserved_token_ID|>``, as the released
class calls them. A stand-in of fewer ranks has the same names at the same offsets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_k2.chat.ranks import read_bytes

CONFIG_FILE = "tokenizer_config.json"
NUM_SPECIAL = 256  # num_reserved_special_tokens

CONTROL_TOKENS: Mapping[str, int] = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "[UNK]": 254,
    "[PAD]": 255,
}
"""Kimi K2's names, as offsets from the number of ranks; used where no tokenizer_config.json is."""
ROLES: Mapping[str, str] = {"bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]", "pad": "[PAD]"}
"""Tokens that a program asks for by their use, and Kimi K2's choice."""


def special_tokens(config: Mapping[str, Any], num_ranks: int) -> dict[str, int]:
    """Return name -> id of the 256 special ids, in their order.

    Args:
        config: tokenizer_config.json, empty for Kimi K2's own names.
        num_ranks: the first special id.

    Raises:
        ValueError: ``added_tokens_decoder`` names an id outside the 256, or a name twice.
    """
    names = {num_ranks + offset: name for name, offset in CONTROL_TOKENS.items()}
    if config.get("added_tokens_decoder") is not None:
        names = added_tokens(config)
    ids = range(num_ranks, num_ranks + NUM_SPECIAL)
    found: dict[str, int] = {}
    for token in [*ids, *sorted(set(names) - set(ids))]:
        name = names.get(token, f"<|reserved_token_{token}|>")
        if token not in ids:
            raise ValueError(
                f"{CONFIG_FILE}: special token {token} {name!r} is not among the {NUM_SPECIAL} ids "
                f"from {num_ranks}, the number of ranks in the rank file"
            )
        if name in found:
            raise ValueError(f"{CONFIG_FILE}: {found[name]} and {token} are both named {name!r}")
        found[name] = token
    return found


def added_tokens(config: Mapping[str, Any]) -> dict[int, str]:
    """Return id -> name of ``added_tokens_decoder``, empty without one.

    Raises:
        ValueError: an entry is no id with a ``content``.
    """
    found = {}
    try:
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            found[int(token)] = str(entry["content"] if isinstance(entry, Mapping) else entry)
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{CONFIG_FILE}: added_tokens_decoder is malformed ({error!r})") from error
    return found


def spoken_tokens(config: Mapping[str, Any], tokens: Mapping[str, int]) -> frozenset[int]:
    """Return the special ids that are part of what a model says: the marks of tool calls.

    ``added_tokens_decoder`` has ``special: false`` there, and transformers' ``skip_special_tokens``
    keeps them.
    """
    entries = config.get("added_tokens_decoder")
    if entries is None:
        return frozenset(tokens[name] for name in CONTROL_TOKENS if name.startswith("<|tool_call"))
    plain = (
        int(token)
        for token, entry in entries.items()
        if isinstance(entry, Mapping) and entry.get("special") is False
    )
    return frozenset(plain)


def role_ids(config: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad.

    Args:
        config: tokenizer_config.json; ``eos_token`` and the like win over Kimi K2's names.
        tokens: name -> id of the special ids.

    Raises:
        ValueError: a name is not among the special ids.
    """
    found = {}
    for role, default in ROLES.items():
        given = config.get(f"{role}_token") or default
        name = str(given.get("content") if isinstance(given, Mapping) else given)
        if name not in tokens:
            raise ValueError(f"{CONFIG_FILE}: {role}_token {name!r} is not among the special ids")
        found[role] = tokens[name]
    return found


def read_config(path: Path) -> Mapping[str, Any]:
    """Return tokenizer_config.json, empty where it is not there.

    Raises:
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config
