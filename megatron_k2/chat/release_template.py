"""A release's own jinja chat template, run as transformers runs it.

For renders that must be the release's to the byte, and to compare our rules with them
(``tools/doctor.py``). Control tokens are recognised in the whole rendered text, in what messages
say too: training data and prompts use ``template.py``, which keeps the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

TEMPLATE_FILE = "chat_template.jinja"


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return a release's chat template: the file, else tokenizer_config.json's, else None."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in given}
        given = named.get("default")
    return given if isinstance(given, str) else None


def render_template(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a jinja chat template as transformers does, in the sandbox.

    Args:
        template: its text; it is not trusted.
        messages: the dialogue.
        variables: ``tools``, ``add_generation_prompt`` and what else the template reads.

    Raises:
        ValueError: the template does not render.
    """
    import jinja2

    try:
        return str(_compiled(template).render(messages=messages, **variables))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template does not render: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Serialise as transformers' filter does: jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def sorted_keys(value: Any) -> Any:
    """Return JSON data with the keys of every object sorted."""
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list | tuple) else value
