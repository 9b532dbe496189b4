"""Model presets: data files that lay defaults under Megatron's own arguments.

Each ``<name>.toml`` holds one entry a Megatron argparse *dest*, with its value and where the value
comes from: the released configuration, the Kimi K2 report, then Moonlight's published choice, then
Megatron's default. A string value is parsed by the type of its argument, as argparse does with
string defaults (``moe_layer_freq``). An explicit flag wins over a preset; ``arguments.py`` lays the
values, ``argument_checks.py`` refuses contradictions. Left out: parallel layout, precision, device.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

Value = bool | int | float | str | list[str]


@dataclass(frozen=True)
class Field:
    """One default of a preset: the value and where it comes from."""

    value: Value
    source: str


@dataclass(frozen=True)
class Preset:
    """A named set of defaults, keyed by Megatron's argparse dest."""

    name: str
    summary: str
    fields: dict[str, Field]

    def value(self, dest: str, default: Value | None = None) -> object:
        """Return the value of one argument, or ``default`` where the preset is silent."""
        field = self.fields.get(dest)
        return default if field is None else field.value


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


@cache
def load_preset(name: str) -> Preset:
    """Read one preset.

    Args:
        name: one of ``list_presets()``.

    Raises:
        ValueError: no preset has that name, or its file is malformed.
    """
    if name not in list_presets():
        raise ValueError(f"--k2-preset {name!r} is unknown; allowed: {', '.join(list_presets())}")
    text = resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_preset(text)


def parse_preset(text: str) -> Preset:
    """Parse the text of a preset file.

    Raises:
        ValueError: not TOML, no name or summary, or an entry without value or source.
    """
    table = tomllib.loads(text)
    name, summary = table.pop("name", None), table.pop("summary", None)
    if not isinstance(name, str) or not isinstance(summary, str):
        raise ValueError("a preset needs a name and a summary")
    fields = {}
    for dest, entry in table.items():
        if not isinstance(entry, dict) or set(entry) != {"value", "source"} or not entry["source"]:
            raise ValueError(f"preset {name}: {dest} needs exactly a value and a source")
        if not _is_value(entry["value"]):
            raise ValueError(
                f"preset {name}: {dest} must be a number, a string, true/false or a list of strings"
            )
        fields[dest] = Field(entry["value"], entry["source"])
    return Preset(name, summary, fields)


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, bool | int | float | str)
