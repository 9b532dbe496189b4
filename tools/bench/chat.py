"""Chat format: tokens a second of encoding, parsing and the token ledger on a long dialogue.

A dialogue with tools about the Python library's sources, ``--turns`` questions long, in a
vocabulary of 65,536 tokens learnt from them (``tokenization.py``), or in ``--tokenizer-model``.
Each row has its peer in the same run: tiktoken alone on the same texts for what encodes, tiktoken's
decoding for what parses. CPU seconds of one thread count, the best of ``--repeats``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import print_json, print_table
from tokenization import make_vocabulary, read_texts

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.chat.ledger_check import agreement
from megatron_k2.chat.ledger_file import from_json, to_json
from megatron_k2.chat.template import loss_mask

BYTES = 4_000_000
TOOL = {"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer-model", type=Path, help="a release's folder or a rank file")
    parser.add_argument("--turns", type=int, default=60, help="questions of the dialogue")
    parser.add_argument("--repeats", type=int, default=5, help="the best of so many counts")
    options = parser.parse_args()
    texts = list(read_texts(BYTES))
    with tempfile.TemporaryDirectory() as name:
        path = options.tokenizer_model
        if path is None:
            corpus = Path(name) / "corpus.jsonl"
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            corpus.write_text("".join(lines), encoding="utf-8")
            make_vocabulary(Path(name), corpus)
            path = Path(name) / "kimi"
        format = replace(KimiFormat.load(path, "kimi-k2-thinking"), keep="all")
    rows = measure(format, dialogue(texts, options.turns), options.repeats)
    print_table("chat format", list(rows[0]), [list(row.values()) for row in rows])
    print_json(rows=rows)


def dialogue(texts: list[str], turns: int) -> list[dict[str, Any]]:
    """Questions, calls with long arguments, returns and answers made of real texts."""
    pieces = iter(texts)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be exact."}]
    for turn in range(turns):
        call = {"id": f"functions.read_file:{turn}", "type": "function"}
        arguments = json.dumps({"path": f"{turn}.py", "text": next(pieces)[:4_000]})
        call["function"] = {"name": "read_file", "arguments": arguments}
        messages += [
            {"role": "user", "content": next(pieces)[:500]},
            {
                "role": "assistant",
                "reasoning_content": next(pieces)[:2_000],
                "content": None,
                "tool_calls": [call],
            },
            {"role": "tool", "tool_call_id": call["id"], "content": next(pieces)[:6_000]},
            {
                "role": "assistant",
                "reasoning_content": next(pieces)[:500],
                "content": next(pieces)[:2_000],
            },
        ]
    return messages


def best(work: Callable[[], Any], repeats: int) -> float:
    """Return the least CPU seconds of a piece of work."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def measure(
    format: KimiFormat, messages: list[dict[str, Any]], repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each piece of work."""
    tools = [TOOL]
    ids, owners = format.encode_owned(messages, tools, keep="all")
    texts = [part.text for part in format.segments(messages, tools, keep="all")]
    answers = [
        [
            i
            for i, owner in zip(ids, owners, strict=True)
            if owner.turn == turn and owner.is_produced
        ]
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    ledger = record(format, messages, answers)
    said = [token for answer in answers for token in answer]

    def parse(size: int) -> None:
        for answer in answers:
            reader = format.parser([], tools)
            for at in range(0, len(answer), size):
                reader.feed(answer[at : at + size])
            reader.finish()

    encoding = best(lambda: [format.encode_text(text) for text in texts], repeats)
    decoding = best(lambda: format.decode(said), repeats)
    work: list[tuple[str, int, Callable[[], Any], float]] = [
        ("encode", len(ids), lambda: format.encode(messages, tools), encoding),
        (
            "encode with mask",
            len(ids),
            lambda: loss_mask(format.encode_owned(messages, tools, keep="all")[1]),
            encoding,
        ),
        ("parse whole answers", len(said), lambda: parse(10**9), decoding),
        ("parse token by token", len(said), lambda: parse(1), decoding),
        ("ledger: record", len(ids), lambda: record(format, messages, answers), encoding),
        ("ledger: check", len(ids), lambda: agreement(ledger), encoding),
        ("ledger: JSON and back", len(ids), lambda: from_json(format, to_json(ledger)), encoding),
    ]
    rows = []
    for name, tokens, call, peer in work:
        seconds = best(call, repeats)
        rows.append(
            {
                "work": name,
                "tokens": tokens,
                "tokens_per_s": round(tokens / seconds),
                "time_vs_tiktoken": round(seconds / peer, 2),
            }
        )
    return rows


def record(
    format: KimiFormat, messages: list[dict[str, Any]], answers: list[list[int]]
) -> TokenLedger:
    """Return the dialogue's ledger, its answers said token by token."""
    first = next(at for at, one in enumerate(messages) if one["role"] == "assistant")
    ledger = TokenLedger.begin(format, messages[:first], [TOOL])
    said = iter(answers)
    for message in messages[first:]:
        if message["role"] != "assistant":
            ledger.add([message])
            continue
        ledger.begin_answer()
        ids = next(said)
        ledger.extend(ids, [-0.25] * len(ids), [1] * len(ids))
        ledger.end_answer()
    return ledger


if __name__ == "__main__":
    main()
