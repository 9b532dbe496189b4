"""English for the scripted domains: labels, plurals, what fields mean, sentences of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNITS = {
    "eur": "euros", "usd": "US dollars", "ct": "cents", "kg": "kilograms", "g": "grams",
    "mg": "milligrams", "t": "tonnes", "km": "kilometres", "m": "metres", "cm": "centimetres",
    "mm": "millimetres", "m2": "square metres", "m3": "cubic metres", "ha": "hectares",
    "l": "litres", "ml": "millilitres", "c": "degrees Celsius", "k": "kelvin",
    "percent": "percent", "permille": "thousandths", "kw": "kilowatts", "kwh": "kilowatt hours",
    "kmh": "kilometres per hour", "ms": "milliseconds", "s": "seconds", "minutes": "minutes",
    "hours": "hours", "days": "days", "months": "months", "years": "years", "lux": "lux",
    "db": "decibels", "bpm": "beats per minute", "hz": "hertz", "mp": "megapixels",
    "gb": "gigabytes", "mb": "megabytes", "kb": "kilobytes", "px": "pixels", "bar": "bar",
    "n": "newtons", "ppm": "parts per million", "bps": "basis points", "mms": "mm per second",
    "ugm3": "micrograms per cubic metre", "mgl": "milligrams per litre", "gold": "gold pieces",
}  # fmt: skip


def label(name: str) -> str:
    """Return snake_case as words."""
    return name.replace("_", " ")


_PARTICLES = {"up", "down", "in", "out", "off", "away", "on", "back", "ahead", "over", "for", "cut",
              "protect"}  # fmt: skip
_MARKS = {"mark", "flag", "report"}
_MAKES = {"let", "make", "set", "take", "open", "send", "put", "bring", "move"}
_WHEN = {
    "starts": "start", "begins": "start", "departs": "departure", "arrives": "arrival",
    "opens": "opening", "airs": "airing", "ends": "end", "publishes": "publication",
    "ships": "shipping", "launches": "launch", "renews": "renewal", "expires": "expiry",
    "leaves": "departure", "settles": "settlement", "matures": "maturity", "closes": "closing",
    "shift_starts": "shift start", "returns": "return", "meets": "meeting", "takeoff": "takeoff",
    "back": "return", "doors": "opening of the doors", "due": "due", "milking": "milking",
}  # fmt: skip


def phrase(verb: str, thing: str) -> str:
    """Return a verb in snake_case done to a thing: ``mark_spam`` -> mark a message as spam."""
    head, *rest = verb.split("_")
    if not rest or (len(rest) == 1 and rest[0] in _PARTICLES):
        return f"{label(verb)} {thing}"
    if head in _MARKS:
        return f"{head} {thing} as {' '.join(rest)}"
    if rest[0] in ("to", "in", "on") or (head in _MAKES and rest[0] != "possession"):
        return f"{head} {thing} {' '.join(rest)}"
    return f"{label(verb)} for {thing}"


def capital(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def a(words: str) -> str:
    """Return words after ``a`` or ``an``."""
    vowel = words[0] in "aeiou" and not words.startswith(("use", "uni", "eu", "one", "ut"))
    return f"{'an' if vowel or words.startswith('hour') else 'a'} {words}"


def plural(name: str) -> str:
    """Return the plural of a label or of snake_case."""
    if name.endswith("shelf"):
        return f"{name[:-1]}ves"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh", "z")) else f"{name}s"


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as a list in a sentence."""
    words = [*words]
    return " ".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def noun(name: str) -> str:
    """Return what a field is called, its unit left out."""
    head, _, unit = name.rpartition("_")
    if head and unit in ("at", "on"):
        kind = "time" if unit == "at" else "date"
        return f"{_WHEN[head]} {kind}" if head in _WHEN else f"{kind} {label(head)}"
    return label(head if head and unit in _UNITS else name.removesuffix("_id"))


def unit_of(name: str) -> str:
    """Return `` in UNIT``, "" without one."""
    head, _, unit = name.rpartition("_")
    return f" in {_UNITS[unit]}" if head and unit in _UNITS else ""


def field_words(entity: str, name: str, schema: Mapping[str, Any]) -> str:
    """Return the description of a field."""
    of = f"of the {label(entity)}"
    if schema["type"] == "boolean":
        return f"Whether the mark '{label(name)}' is set for the {label(entity)}"
    text = f"{capital(noun(name))} {of}{unit_of(name)}"
    if "enum" in schema:
        return f"{text}: {listed(schema['enum'], 'or')}"
    if "minimum" in schema:
        return f"{text}, from {schema['minimum']} to {schema['maximum']}"
    if schema["type"] == "array":
        return f"{capital(noun(name))} {of}, a list of texts"
    return text + {10: ", YYYY-MM-DD", 16: ", YYYY-MM-DDTHH:MM"}.get(schema.get("maxLength", 0), "")


def relation_words(field: str, relation: str, value: Any) -> str:
    """Return a condition as the end of a sentence."""
    ends = {"equals": "", "not": " not", "at_least": " at least", "at_most": " at most"}
    if isinstance(value, bool):
        return f"mark '{label(field)}' is {'set' if value else 'not set'}"
    said = label(value) if isinstance(value, str) else f"{value}"
    unit = unit_of(field).removeprefix(" in ")
    many = noun(field).endswith("s") and not noun(field).endswith(("ss", "us", "is"))
    verb = "are" if many else "is"
    return f"{noun(field)} {verb}{ends[relation]} {said}{' ' + unit if unit else ''}"
