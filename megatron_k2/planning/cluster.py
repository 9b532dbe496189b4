"""Clusters: what a GPU holds, computes and sends; figures with their sources in clusters.toml.

A user's own cluster is a file of the same form, or one of these with fields changed. All rates are
peaks: a plan divides by them, so its times are the least that physics allows, not a forecast.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

from megatron_k2.inputs import read_toml
from megatron_k2.planning.wire import Message


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        name: of the kind.
        num_gpus: how many.
        memory_bytes: of a GPU.
        memory_bandwidth: bytes a second.
        bf16_flops: dense products a second.
        fp8_flops: dense products a second.
        node_gpus: GPUs that share a fast link.
        node_bandwidth: bytes a second and direction within a node.
        network_bandwidth: bytes a second and direction of a GPU between nodes.
        host_bandwidth: bytes a second and direction between a GPU and its host.
        host_bytes: memory of a node's host.
    """

    name: str
    num_gpus: int
    memory_bytes: float
    memory_bandwidth: float
    bf16_flops: float
    fp8_flops: float
    node_gpus: int
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    host_bytes: float

    def seconds(self, message: Message) -> float:
        """Return the least time of one message or collective: its bytes over its slowest link.

        An all-to-all sends each peer an equal part: parts within the node and parts between nodes
        travel at once. Any other collective that leaves the node runs at the network's speed, and
        the GPUs of a node that belong to its group share the work.
        """
        peers = len(message.ranks) - 1
        if peers < 1:
            return 0.0
        num_nodes, neighbours = _spread(message.ranks, self.node_gpus)
        if num_nodes == 1:
            return message.sent_bytes / self.node_bandwidth
        if message.kind == "all-to-all":
            near = message.sent_bytes * (neighbours - 1) / peers
            far = message.sent_bytes - near
            return max(near / self.node_bandwidth, far / self.network_bandwidth)
        return message.sent_bytes / (self.network_bandwidth * neighbours)


@lru_cache(maxsize=4096)
def _spread(ranks: tuple[int, ...], node_gpus: int) -> tuple[int, int]:
    """Return (nodes that a group spans, most of its ranks on one of them)."""
    nodes = Counter(rank // node_gpus for rank in ranks)
    return len(nodes), max(nodes.values())


_FIELDS = {field.name for field in fields(Cluster)} - {"name", "num_gpus"}


def list_clusters() -> list[str]:
    """Return the names of the built-in kinds."""
    return sorted(_built_in())


def load_cluster(kind: str, num_gpus: int, changes: Mapping[str, float] | None = None) -> Cluster:
    """Return a cluster.

    Args:
        kind: a built-in kind, or a TOML file with one table of that form.
        num_gpus: how many GPUs.
        changes: fields to replace.

    Raises:
        ValueError: an unknown kind or field, a missing field, or a number that is not positive.
    """
    tables = _built_in()
    if kind not in tables:
        path = Path(kind)
        if not path.is_file():
            raise ValueError(f"--cluster {kind!r}: allowed are {', '.join(tables)}, or a TOML file")
        try:
            tables = read_toml(path)
        except ValueError as error:
            raise ValueError(f"--cluster {error}") from error
        if len(tables) != 1:
            raise ValueError(f"--cluster {kind}: the file must hold one table, a kind of cluster")
        kind = next(iter(tables))
    values = {
        name: entry["value"] if isinstance(entry, dict) else entry
        for name, entry in tables[kind].items()
        if name != "summary"
    }
    if missing := _FIELDS - set(values):
        raise ValueError(f"--cluster {kind}: {', '.join(sorted(missing))} missing")
    if unknown := set(values) - _FIELDS:
        raise ValueError(f"--cluster {kind}: {', '.join(sorted(unknown))} unknown")
    values = {name: _number(kind, name, value) for name, value in values.items()}
    cluster = Cluster(name=kind, num_gpus=num_gpus, **values)  # type: ignore[arg-type]
    if unknown := set(changes or ()) - _FIELDS:
        raise ValueError(f"a cluster has no {', '.join(sorted(unknown))}: {', '.join(_FIELDS)}")
    cluster = replace(cluster, **(changes or {}))  # type: ignore[arg-type]
    if bad := [name for name in sorted(_FIELDS) if not getattr(cluster, name) > 0]:
        raise ValueError(f"--cluster {kind}: {bad[0]} must be positive")
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus} must be at least 1")
    return cluster


def _number(kind: str, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"--cluster {kind}: {name} must be a number, not {value!r}")
    return int(value) if name == "node_gpus" else value


def _built_in() -> dict[str, dict[str, dict[str, float]]]:
    text = resources.files(__package__).joinpath("clusters.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
