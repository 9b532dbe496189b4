"""Questions about agents, worlds and tasks: prompts of a TOML file, inputs as one JSON object.

The inputs stand in the question's last message under the prompt's words (``agentic/model.py``);
``models/json_answers.py`` reads the answers.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.tasks.settings import TaskSettings


@cache
def data(name: str) -> Mapping[str, Any]:
    """Return a TOML file of this folder."""
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def question_of(
    kind: str,
    prompt: str,
    inputs: Mapping[str, Any],
    settings: TaskSettings,
    seed: int,
    script: Mapping[str, Any],
) -> Question:
    """Return the question of a prompt about inputs.

    Args:
        kind: role of the model.
        prompt: table of ``prompts.toml``, with ``system`` and ``user``.
        inputs: JSON.
        settings: temperature and length of the answer.
        seed: of sampling.
        script: for a scripted model.
    """
    words = data("prompts")[prompt]
    told = json.dumps(inputs, ensure_ascii=False, sort_keys=True)
    messages = (
        {"role": "system", "content": words["system"]},
        {"role": "user", "content": f"{words['user']}\n\n{told}"},
    )
    return Question(
        kind,
        messages,
        seed=seed,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        script={"prompt": prompt, **script},
    )


def in_order(value: Any) -> Any:
    """Return a JSON value with sorted keys: the same in memory and read from any file."""
    return json.loads(json.dumps(value, sort_keys=True))


def prompt_origin(model: str = "") -> dict[str, Any]:
    """Return what a record's origin says of the prompts it was made with."""
    return {"prompts": data("prompts")["version"]} | ({"model": model} if model else {})
