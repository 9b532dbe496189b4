"""``python examples/k2_nano/dialogues.py OUT.jsonl [NUMBER]``: small talk with tools, from a seed.
``... --text OUT.jsonl``: the Python library's text, to pretrain on.
``... --tasks FOLDER``: 100 new questions as ``tasks.jsonl``, 100 for tools as ``calls.jsonl``.

Four tasks that a 20 M model learns in minutes: repeat words, count, add by a tool, ask a weather
tool about one or two cities (two are parallel calls). The same seed gives the same bytes; words and
numbers are drawn, so that held-out dialogues ask what no other has asked.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CITIES = (
    "Rome Paris Oslo Lima Cairo Delhi Tokyo Seoul Quito Hanoi Dakar Perth Turin Lyon Kyoto Malmo"
)
WORDS = (
    "the a class value list return text name file line error open close read write key index path"
)
SKIES = "sunny cloudy rainy windy"
Message = dict[str, Any]


def _tool(name: str, description: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("add", "Add two numbers.", a="integer", b="integer"),
    _tool("get_weather", "Weather of a city.", city="string"),
]
SYSTEM = {"role": "system", "content": "You are K2 nano."}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _calls(*calls: tuple[str, str, dict[str, Any]]) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for id, name, arguments in calls
        ],
    }


def _returned(id: str, text: str) -> Message:
    return {"role": "tool", "tool_call_id": id, "content": text}


def repeat(draw: random.Random) -> list[Message]:
    """Say the words again."""
    words = " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 4)))
    return [_user(f"Repeat: {words}"), _answer(words)]


def count(draw: random.Random) -> list[Message]:
    """Count a few numbers up."""
    first = draw.randint(0, 90)
    numbers = range(first, first + draw.randint(2, 6))
    asked = f"Count from {numbers[0]} to {numbers[-1]}."
    return [_user(asked), _answer(", ".join(map(str, numbers)))]


def add(draw: random.Random) -> list[Message]:
    """Let the tool add."""
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    return [
        _user(f"Add {a} and {b}."),
        _calls(("functions.add:0", "add", {"a": a, "b": b})),
        _returned("functions.add:0", str(a + b)),
        _answer(f"{a} + {b} = {a + b}"),
    ]


def weather(draw: random.Random) -> list[Message]:
    """Ask about one city, or two at once."""
    cities = draw.sample(CITIES.split(), draw.randint(1, 2))
    skies = draw.choices(SKIES.split(), k=len(cities))
    ids = [f"functions.get_weather:{at}" for at in range(len(cities))]
    calls = [(id, "get_weather", {"city": city}) for id, city in zip(ids, cities, strict=True)]
    answer = ", ".join(f"{city}: {sky}" for city, sky in zip(cities, skies, strict=True))
    return [
        _user(f"Weather in {' and '.join(cities)}?"),
        _calls(*calls),
        *(_returned(id, sky) for id, sky in zip(ids, skies, strict=True)),
        _answer(answer),
    ]


TASKS: list[Callable[[random.Random], list[Message]]] = [repeat, count, add, weather]


def dialogue(seed: int, number: int) -> dict[str, Any]:
    """Return one dialogue as a row of ``tools/preprocess_sft.py``."""
    draw = random.Random(f"{seed}/{number}")
    task = draw.choice(TASKS)
    row: dict[str, Any] = {"messages": [SYSTEM, *task(draw)]}
    return row | {"tools": TOOLS} if task in (add, weather) else row


TEXT_BYTES = 4_000_000


def library_text() -> Iterator[str]:
    """Yield JSON lines of the Python library's text, as much as a short pretraining reads."""
    from megatron_k2.data.documents import read_python_library

    size = 0
    for document in read_python_library():
        if size > TEXT_BYTES:
            return
        size += len(document.text)
        yield json.dumps({"text": document.text})


def write_tasks(folder: Path, number: int = 100) -> None:
    """Write dialogues of another seed: what has a known answer, and what wants a tool."""
    rows = [dialogue(1, at) for at in range(8 * number)]
    direct = [row for row in rows if "tools" not in row][:number]
    calling = [row for row in rows if "tools" in row][:number]
    tasks = [
        {
            "id": str(at),
            "messages": row["messages"][:-1],
            "answer": row["messages"][-1]["content"],
            "group": "repeat" if row["messages"][1]["content"].startswith("Repeat") else "count",
        }
        for at, row in enumerate(direct)
    ]
    # Up to and with the first answer, the reference that calls.
    calls = [row | {"messages": row["messages"][:3]} for row in calling]
    for name, found in (("tasks", tasks), ("calls", calls)):
        lines = (json.dumps(row, ensure_ascii=False) for row in found)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(out: str, number: str = "4000") -> None:
    """Write the dialogues, the text, or tasks."""
    if out == "--text":
        Path(number).write_text("\n".join(library_text()) + "\n", encoding="utf-8")
        return
    if out == "--tasks":
        write_tasks(Path(number))
        return
    rows = (json.dumps(dialogue(0, at), ensure_ascii=False) for at in range(int(number)))
    Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
