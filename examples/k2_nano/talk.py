"""``python examples/k2_nano/talk.py URL``: OpenAI's own client, two dialogues with tools, streamed.

The tools really run: what the model calls is computed here and given back. Needs a server of
``serve.sh`` and ``pip install openai``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dialogues import SYSTEM, TOOLS
from openai import OpenAI

ASKED = ("Add 17 and 25.", "Weather in Rome and Oslo?")


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    """Return what a tool says."""
    if name == "add":
        return str(int(arguments["a"]) + int(arguments["b"]))
    return "sunny" if arguments["city"] < "P" else "rainy"


def stream_answer(client: OpenAI, messages: list[Any]) -> dict[str, Any]:
    """Return the assistant's message, shown as it comes."""
    calls: dict[int, dict[str, Any]] = {}
    text = ""
    stream = client.chat.completions.create(
        model="k2-nano", messages=messages, tools=TOOLS, stream=True, temperature=0, max_tokens=96
    )
    for chunk in stream:
        delta = chunk.choices[0].delta if chunk.choices else None
        if delta is None:
            continue
        text += delta.content or ""
        print(delta.content or "", end="", flush=True)
        for part in delta.tool_calls or []:
            call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += part.id or ""
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
    print("".join(f" [{call['id']} {call['arguments']}]" for call in calls.values()))
    made = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in calls.values()
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": made} if made else {})


def main(url: str) -> int:
    """Talk; return 0 if every call could be run and every turn ended in an answer."""
    client = OpenAI(base_url=url, api_key="none")
    for asked in ASKED:
        print(f"> {asked}")
        messages: list[Any] = [SYSTEM, {"role": "user", "content": asked}]
        for _ in range(3):  # an answer, or calls and then an answer
            messages.append(stream_answer(client, messages))
            calls = messages[-1].get("tool_calls", [])
            for call in calls:
                function = call["function"]
                said = run_tool(function["name"], json.loads(function["arguments"]))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
            if not calls:
                break
        else:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
