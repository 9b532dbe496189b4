"""The notation of the scripted domains, read into types, acts and conditions.

An entity is ``e.NAME = "VERB; FIELDS"``, the verb that creates it and fields: ``x>`` refers to
entity x, ``x?`` is true or false, ``x*`` a list of texts, ``x a|b`` an enumeration, ``x 1..9`` a
number (a decimal point makes it fractional), ``x date``, ``x time``, and ``x`` alone a text. Acts:
``VERB ENTITY a,b>c`` moves a state; ``VERB ENTITY +FIELD`` and ``-FIELD`` add and take;
``transfer ENTITY ~FIELD`` moves an amount; each may end in `` if FIELD RELATION VALUE``. Needs:
``ENTITY OTHER.FIELD VALUE``: what must hold of the other record when one is created.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from megatron_k2.agentic.repository.library.wording import field_words, label

_ACT = re.compile(r"(\w+) (\w+) (\S+)(?: if (\w+) (equals|not|at_least|at_most) (\S+))?")
_RANGE = re.compile(r"(-?[\d.]+?)\.\.(-?[\d.]+)")


@dataclass(frozen=True)
class Act:
    """Something done to a record.

    Attributes:
        kind: ``move`` of a state, ``plus``, ``minus`` or ``transfer`` of a number.
        field: that changes.
        before: states it is allowed in.
        after: state that it leads to.
        condition: further ``(field, relation, value)``.
    """

    verb: str
    entity: str
    kind: str
    field: str
    before: tuple[str, ...] = ()
    after: str = ""
    condition: tuple[str, str, Any] | None = None


@dataclass(frozen=True)
class Known:
    """A domain that the script knows.

    Attributes:
        types: as ``world/README.md`` says.
        verbs: entity -> the verb that creates it.
        acts: in the order of the file.
        needs: (entity, other, field, value).
    """

    name: str
    category: str
    about: str
    types: Mapping[str, Any]
    verbs: Mapping[str, str]
    acts: tuple[Act, ...]
    needs: tuple[tuple[str, str, str, Any], ...]

    def fields(self, entity: str) -> Mapping[str, Any]:
        """Return the fields of an entity without its key."""
        return {
            name: schema
            for name, schema in self.types["entities"][entity]["fields"].items()
            if name != self.key(entity)
        }

    def key(self, entity: str) -> str:
        """Return the name of the key of an entity."""
        return str(self.types["entities"][entity]["key"])

    def state_field(self, entity: str) -> str | None:
        """Return the field that acts move, else the last enumeration, None where there is none."""
        moved = [act.field for act in self.acts if act.entity == entity and act.kind == "move"]
        enums = [name for name, schema in self.fields(entity).items() if "enum" in schema]
        return moved[0] if moved else enums[-1] if enums else None


@cache
def known_domains(category: str) -> Mapping[str, Known]:
    """Return the domains of a category, by name without it."""
    file = resources.files(__package__).joinpath(f"{category}.toml")
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: _known(name, category, one) for name, one in table.items()}


def _known(name: str, category: str, table: Mapping[str, Any]) -> Known:
    entities, verbs = {}, {}
    for entity, text in table["e"].items():
        verb, _, fields = text.partition("; ")
        verbs[entity] = verb
        entities[entity] = _entity(entity, fields.split(", "))
    acts = tuple(_act(text, entities) for text in table.get("acts", ()))
    for act in acts:  # new records start where something can be done with them
        schema = entities[act.entity]["fields"][act.field]
        if act.kind == "move" and "default" not in schema:
            schema["default"] = schema["enum"][0]
    needs = tuple(_need(text) for text in table.get("needs", ()))
    types = {"entities": entities}
    return Known(name, category, table["about"], types, verbs, acts, needs)


def _entity(entity: str, fields: list[str]) -> dict[str, Any]:
    key = f"{entity}_id"
    schemas = {
        key: {"type": "string", "maxLength": 40, "description": f"Key of the {label(entity)}"}
    }
    for text in fields:
        name, _, spec = text.partition(" ")
        schemas.update([_field(entity, name, spec)])
    prefix = "".join(part[:3] for part in entity.split("_")).upper()[:6]
    return {"key": key, "prefix": f"{prefix}-", "fields": schemas}


def _field(entity: str, name: str, spec: str) -> tuple[str, dict[str, Any]]:
    if name.endswith(">"):
        target = name[:-1]
        return f"{target}_id", {"ref": target, "description": f"Key of the {label(target)}"}
    schema: dict[str, Any]
    if name.endswith("?"):
        name, schema = name[:-1], {"type": "boolean", "default": False}
    elif name.endswith("*"):
        name, schema = name[:-1], {
            "type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 20,
            "default": [],
        }  # fmt: skip
    elif spec in ("date", "time"):
        schema = {"type": "string", "maxLength": 10 if spec == "date" else 16}
    elif "|" in spec:
        schema = {"type": "string", "enum": spec.split("|")}
    elif match := _RANGE.fullmatch(spec):
        kind = "number" if "." in match[1] + match[2] else "integer"
        low, high = (float(one) if kind == "number" else int(one) for one in match.groups())
        schema = {"type": kind, "minimum": low, "maximum": high}
    elif spec:
        raise ValueError(f"{entity}.{name}: unknown {spec!r}")
    else:
        schema = {"type": "string", "maxLength": 120}
    return name, {**schema, "description": field_words(entity, name, schema)}


def _act(text: str, entities: Mapping[str, Any]) -> Act:
    match = _ACT.fullmatch(text)
    if match is None:
        raise ValueError(f"no act: {text!r}")
    verb, entity, what, field, relation, value = match.groups()
    fields = entities[entity]["fields"]
    condition = (field, relation, _value(value)) if field else None
    if what[0] in "+-~":
        kind = {"+": "plus", "-": "minus", "~": "transfer"}[what[0]]
        return Act(verb, entity, kind, what[1:], condition=condition)
    first, _, after = what.partition(">")
    before = tuple(first.split(","))
    of_state = [n for n, s in fields.items() if {*before, after} <= {*s.get("enum", ())}]
    return Act(verb, entity, "move", of_state[0], before, after, condition)


def _need(text: str) -> tuple[str, str, str, Any]:
    entity, path, value = text.split(" ")
    other, field = path.split(".")
    return entity, other, field, _value(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
