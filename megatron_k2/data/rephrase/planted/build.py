"""Pairs of a source and a rewriting that is faithful or not: `pairs.jsonl`.

`templates.toml` has short passages and what makes their paraphrases unfaithful; `styled.toml` whole
chunks, rewritten faithfully in the styles of the prompts.

Run it after a change of the templates:

    python -m megatron_k2.data.rephrase.planted.build

Every second item is *held out*: thresholds were chosen on the others alone.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

CHANGES = ("number", "year", "name", "unit", "negation", "swapped", "dropped")
PAIRS = "pairs.jsonl"


def build_pairs() -> Iterator[dict[str, Any]]:
    """Yield {"item", "split", "lang", "kind", "source", "rewrite"}; faithful, styled: true."""
    files = resources.files(__package__)
    templates = tomllib.loads(files.joinpath("templates.toml").read_text(encoding="utf-8"))
    for index, item in enumerate(templates["item"]):
        frame = {
            "item": index,
            "split": ("chosen_on", "held_out")[index % 2],
            "lang": item.get("lang", "en"),
        }
        for kind, source, rewrite in _of_item(item):
            yield {**frame, "kind": kind, "source": source, "rewrite": rewrite}
    styled = tomllib.loads(files.joinpath("styled.toml").read_text(encoding="utf-8"))
    for index, item in enumerate(styled["passage"], len(templates["item"])):
        frame = {"item": index, "split": item["split"], "lang": "en", "kind": "styled"}
        for rewrite in item["rewritings"]:
            yield {**frame, "source": item["source"], "rewrite": rewrite}


def _of_item(item: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    source, first, second = (item[key] for key in ("source", "a", "b"))
    for one, other in ((source, first), (source, second), (first, second)):
        yield "faithful", one, other
        yield "faithful", other, one
    for old, new in item.get("same", []):
        if old in source:
            yield "faithful", source.replace(old, new, 1), first
        for text in (first, second):
            if old in text:
                yield "faithful", source, text.replace(old, new, 1)
    for kind in CHANGES:
        for old, new in item.get(kind, []):
            for text in (first, second):
                if old in text:
                    yield kind, source, text.replace(old, new, 1)
    gap = "" if item.get("lang") == "zh" else " "
    for claim in item.get("added", []):
        for text in (first, second):
            yield "added", source, text + gap + claim


def main() -> None:
    """Write `pairs.jsonl` beside the templates."""
    path = Path(str(resources.files(__package__).joinpath(PAIRS)))
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in build_pairs()]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(lines)} pairs")


if __name__ == "__main__":
    main()
