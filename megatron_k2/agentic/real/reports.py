"""What went wrong with servers, counted under names; and words that try to instruct the model.

A server is a stranger: what it says is data. Nothing that it does is an error of ours; it is a
result for the policy, a reason that is counted, and a mark in the record.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

REASONS = {
    "not_installed": "it is not on this machine",
    "not_started": "its program could not be run",
    "start_timeout": "no answer to initialize in time",
    "start_error": "an error, or no valid answer, to initialize",
    "list_timeout": "no answer to tools/list in time",
    "list_error": "an error, or no valid answer, to tools/list",
    "too_many_pages": "its list of tools did not end",
    "too_many_tools": "more tools than are taken",
    "too_many_bytes": "more declarations than are taken",
    "repeated_name": "two of its tools have one name",
    "bad_tool": "a tool that cannot be declared",
    "call_timeout": "no answer to a call in time",
    "call_error": "an error, or no valid answer, to a call",
    "long_line": "a line of output longer than allowed; it was ended",
    "crash": "it ended while it was needed",
    "sandbox_limit": "a limit of the sandbox ended all servers of the dialogue",
    "no_json": "output that is no JSON-RPC",
    "wrong_id": "an answer to what was not asked, or not any more",
    "asks_sampling": "it asked the client's model to write",
    "asks_elicitation": "it asked the client's user",
    "asks_roots": "it asked for the client's folders",
    "asks_other": "it asked the client for something else",
    "cut_result": "a result longer than the model is shown",
    "not_text": "a result with pictures or other content, left out",
    "injection_description": "a description that gives the model orders",
    "injection_result": "a result that gives the model orders",
}
_ASKS = {
    "sampling/createMessage": "asks_sampling",
    "elicitation/create": "asks_elicitation",
    "roots/list": "asks_roots",
}
# Orders to a model have no business in a description or a result. By words, in English: what is
# flagged is suspicious, what is not may be hostile all the same. Every repetition is bounded, since
# the texts are a stranger's.
_ORDERS = (
    r"\b(ignore|disregard|forget|override)\b[^.\n]{0,40}"
    r"\b(previous|prior|above|earlier|all|other|system)\b[^.\n]{0,30}"
    r"\b(instructions?|prompts?|rules|messages?|tools?)\b",
    r"\byou are now\b|\bnew (system )?instructions?\s{0,3}:",
    r"\bact as (an?|the) (unrestricted|admin|root)\b",
    r"<\s{0,3}/?\s{0,3}(system|important|secret|instructions?)\s{0,3}>",
    r"<\|(im_)?(system|user|assistant|start|end)",
    r"\b(do not|don't|never)\b[^.\n]{0,30}\b(tell|mention|inform|reveal|show|warn)\b"
    r"[^.\n]{0,30}\buser\b",
    r"\b(before|instead of) (using|calling) (this|any|other|another)[^.\n]{0,40}"
    r"\b(must|first|always|read|call)\b",
    r"\b(send|post|upload|forward|exfiltrate|leak|include)\b[^.\n]{0,60}"
    r"\b(api[ _-]?keys?|passwords?|credentials?|secrets?|private keys?|system prompt)\b",
    r"\b(reveal|print|repeat|output)\b[^.\n]{0,30}\b(system prompt|your instructions)\b",
)
_HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\U000e0000-\U000e007f]")
_PATTERNS = tuple(re.compile(one, re.IGNORECASE) for one in _ORDERS)
MAX_READ = 100_000  # characters of a text that are searched
MAX_QUOTE = 120


class Reports(Counter[tuple[str, str]]):
    """How often, by server and reason of ``REASONS``."""

    def add(self, server: str, reason: str) -> None:
        """Count one."""
        assert reason in REASONS, reason
        self[server, reason] += 1

    def asked(self, server: str, method: str) -> None:
        """Count a request that a server sent."""
        self.add(server, _ASKS.get(method, "asks_other"))

    def of(self, server: str) -> dict[str, int]:
        """Return the reasons of a server."""
        return {reason: n for (name, reason), n in sorted(self.items()) if name == server}

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return counts by server, then reason."""
        return {server: self.of(server) for server in sorted({name for name, _ in self})}


def orders_in(text: str) -> list[str]:
    """Return what in a text gives orders to a model or hides from people, quoted; [] if nothing."""
    head = text[:MAX_READ]
    found = [hit[0][:MAX_QUOTE] for one in _PATTERNS if (hit := one.search(head))]
    if hit := _HIDDEN.search(head):
        found.append(f"invisible character U+{ord(hit[0]):04X}")
    return found


def texts_of(value: Any) -> str:
    """Return all words of a JSON value, keys too, a line each."""
    found, front = [], [value]
    while front:
        one = front.pop()
        if isinstance(one, dict):
            front += [*one.values(), *one]
        elif isinstance(one, list):
            front += one
        elif isinstance(one, str):
            found.append(one)
    return "\n".join(reversed(found))
