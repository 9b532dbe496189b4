"""A ledger as one line of JSON, for journals of episodes.

A line names its template with its version and the digest of the tokenizer's files: read with
another one, ids would mean something else. Numbers come back bit for bit. An answer that is under
way can be written too, and goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import Span, TokenLedger

LAYOUT = 1  # raise with any change of the fields


def to_json(ledger: TokenLedger) -> str:
    """Return a ledger as one line."""
    table = {
        "layout": LAYOUT,
        "template": ledger.format.template.label,
        "tokenizer": ledger.format.tokenizer.digest,
        "tools": ledger.tools,
        "messages": ledger.messages,
        "is_answering": ledger.is_answering,
        "spans": [asdict(span) for span in ledger.spans],
        "ids": ledger.ids,
        "log_probs": ledger.log_probs,
        "versions": ledger.versions,
        "is_reasoning": [int(inside) for inside in ledger.is_reasoning],
        "routed_experts": ledger.routed_experts,
    }
    return json.dumps(table, separators=(",", ":"), allow_nan=False)


def from_json(format: KimiFormat, line: str) -> TokenLedger:
    """Return the ledger of a line.

    Args:
        format: of the same template and tokenizer as when it was written.
        line: from ``to_json``.

    Raises:
        ValueError: it is no ledger, or one of another layout, template or tokenizer.
    """
    try:
        table: dict[str, Any] = json.loads(line)
        layout = table["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no ledger: {line[:80]!r} ({error!r})") from error
    ours = {
        "layout": LAYOUT,
        "template": format.template.label,
        "tokenizer": format.tokenizer.digest,
    }
    for key, value in ours.items():
        if table.get(key) != value:
            raise ValueError(f"a ledger of {key} {table.get(key)}, read with {key} {value}")
    try:
        return _filled(format, table)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a ledger of layout {layout} that is not whole: {error!r}") from error


def _filled(format: KimiFormat, table: dict[str, Any]) -> TokenLedger:
    spans = [Span(**{**span, "problems": tuple(span["problems"])}) for span in table["spans"]]
    ledger = TokenLedger(
        format,
        table["tools"],
        table["messages"],
        table["ids"],
        table["log_probs"],
        table["versions"],
        list(map(bool, table["is_reasoning"])),
        table["routed_experts"],
        spans,
    )
    ends = [0, *(span.end for span in spans)]
    lists = (ledger.log_probs, ledger.versions, ledger.is_reasoning, ledger.routed_experts)
    if any(one is not None and len(one) != len(ledger.ids) for one in lists):
        raise ValueError("a ledger whose lists differ in length")
    if ends[:-1] != [span.begin for span in spans] or ends[-1] != len(ledger.ids):
        raise ValueError("a ledger whose spans leave a gap")
    if table["is_answering"]:
        ledger.resume_answer()
    return ledger
