"""The state of a world: immutable, changed by making the next one, with an id that is cheap.

A change copies one table's references, never records: those are replaced, not written to. The id
is the sum of the hashes of all records (a hash of a set, as in Bellare and Micciancio's AdHash), so
a change costs one record's hash and equal records have equal ids in whatever order they came. It
tells states apart, not adversaries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.world.types import Entity, Record, Types, World, compiled

_BYTES = 8  # of an id: 64 bits, as records' ids
_MODULUS = 1 << (8 * _BYTES)
_DIGITS = re.compile(r"(\d+)")


def record_hash(entity: str, key: str, record: Record) -> int:
    """Return the hash of a record at its place, as a number."""
    text = json.dumps([entity, key, record], sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:_BYTES], "big")


@lru_cache(maxsize=65536)
def natural(key: str) -> tuple[Any, ...]:
    """Return what sorts keys as people count: ``o2`` before ``o10``."""
    return tuple(
        (int(part), "") if at % 2 else (-1, part) for at, part in enumerate(_DIGITS.split(key))
    )


def copied(record: Record) -> dict[str, Any]:
    """Return a record that may be written to."""
    return {name: list(v) if isinstance(v, list) else v for name, v in record.items()}


class State(Mapping[str, Mapping[str, Record]]):
    """Records by entity and key, to be read only; ``put`` and ``drop`` return the next state."""

    __slots__ = ("_counters", "_sum", "_tables")

    def __init__(
        self, tables: Mapping[str, Mapping[str, Record]], counters: Mapping[str, int], total: int
    ) -> None:
        """Keep what ``of``, ``put`` and ``drop`` made."""
        self._tables = tables
        self._counters = counters
        self._sum = total

    @classmethod
    def of(cls, types: Types | Mapping[str, Any], world: World) -> State:
        """Return the state of a world; one that is a state already is returned as it is.

        Args:
            types: compiled or not.
            world: of these types (``check_state``); entities may be missing. It is copied.
        """
        if isinstance(world, State):
            return world
        entities = compiled(types).entities
        tables = {
            name: {key: copied(record) for key, record in world.get(name, {}).items()}
            for name in entities
        }
        total = sum(
            record_hash(name, key, record)
            for name, table in tables.items()
            for key, record in table.items()
        )
        counters = {name: _highest(entities[name], table) for name, table in tables.items()}
        return cls(tables, counters, total % _MODULUS)

    @property
    def id(self) -> str:
        """Hash of all records, 16 hexadecimal digits."""
        return f"{self._sum:0{2 * _BYTES}x}"

    @property
    def counters(self) -> Mapping[str, int]:
        """Entity -> the highest number that a key was ever made of."""
        return self._counters

    def world(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return a copy of all records."""
        return {
            name: {key: copied(record) for key, record in table.items()}
            for name, table in self._tables.items()
        }

    def put(self, entity: str, key: str, record: Record, number: int = 0) -> State:
        """Return the state with a record at a key.

        Args:
            entity: one of the types.
            key: new or not.
            record: of its type; not written to hereafter.
            number: that the key was made of; 0: not made of one.
        """
        table = dict(self._tables[entity])
        old = table.get(key)
        total = self._sum + record_hash(entity, key, record)
        if old is not None:
            total -= record_hash(entity, key, old)
        table[key] = record
        counters = self._counters
        if number > counters[entity]:
            counters = {**counters, entity: number}
        return State({**self._tables, entity: table}, counters, total % _MODULUS)

    def drop(self, entity: str, key: str) -> State:
        """Return the state without a record that is there."""
        table = dict(self._tables[entity])
        total = self._sum - record_hash(entity, key, table.pop(key))
        return State({**self._tables, entity: table}, self._counters, total % _MODULUS)

    def __getitem__(self, entity: str) -> Mapping[str, Record]:
        """Return the records of an entity by key."""
        return self._tables[entity]

    def __iter__(self) -> Iterator[str]:
        """Yield the entities."""
        return iter(self._tables)

    def __len__(self) -> int:
        """Return the number of entities."""
        return len(self._tables)


def number_of(entity: Entity, key: str) -> int:
    """Return the number that a key is made of; 0 where it is not the prefix and a number."""
    digits = key.removeprefix(entity.prefix)
    if key.startswith(entity.prefix) and digits.isascii() and digits.isdigit():
        return int(digits) if len(digits) <= 9 else 0
    return 0


def _highest(entity: Entity, table: Mapping[str, Record]) -> int:
    return max((number_of(entity, key) for key in table), default=0)
