"""The scripted answer of role ``simulator``: plumbing of tools that only a model can simulate.

The answer is a receipt made of the call: no world is understood. Where the world has an entity
``call_note`` (``inferred.GENERIC``), a call of a verb that changes something leaves one.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.records import content_id
from megatron_k2.agentic.world.inferred import GENERIC
from megatron_k2.agentic.world.inferred_names import changes_something
from megatron_k2.chat.format import Message


def answer(question: Question) -> Message:
    """Return the answer to a question of ``ModelSimulator``."""
    tool, arguments = question.script["tool"], question.script["arguments"]
    receipt = content_id([tool, arguments])
    said: dict[str, Any] = {"result": {"tool": tool, "done": True, "receipt": receipt}}
    if GENERIC in question.script["world"] and changes_something(tool):
        note = {"tool": tool, "text": json.dumps(arguments, sort_keys=True)[:500]}
        said["changes"] = [{"entity": GENERIC, "set": note}]
    return {"role": "assistant", "content": json.dumps(said, ensure_ascii=False)}
