"""Bytes of messages by algorithm, and seconds on a cluster's links."""

from __future__ import annotations

import pytest

from megatron_k2.planning.cluster import list_clusters, load_cluster
from megatron_k2.planning.wire import Message

EIGHT = tuple(range(8))


@pytest.mark.parametrize(
    ("kind", "given", "own", "sent"),
    [
        ("all-reduce", 800, 0, 2 * 700), ("all-gather", 100, 0, 700),
        ("reduce-scatter", 800, 0, 700), ("all-to-all", 800, 100, 700), ("send", 800, 0, 800),
        ("receive", 800, 0, 0), ("broadcast", 800, 0, 700),
    ],
)  # fmt: skip
def test_what_leaves_a_rank(kind: str, given: int, own: int, sent: float) -> None:
    assert Message(kind, EIGHT, "", given, own).sent_bytes == sent


def test_a_message_within_a_node_takes_the_fast_link_and_between_nodes_the_slow_one() -> None:
    cluster = load_cluster("h800", 64)
    inside = Message("all-gather", EIGHT, "", 1 << 20)
    between = Message("all-gather", tuple(range(0, 64, 8)), "", 1 << 20)
    assert cluster.seconds(inside) == pytest.approx(7 * 2**20 / 200e9)
    assert cluster.seconds(between) == pytest.approx(7 * 2**20 / 50e9)
    assert cluster.seconds(Message("all-gather", (3,), "", 1 << 20)) == 0


def test_an_all_to_all_over_two_nodes_waits_for_what_crosses() -> None:
    cluster = load_cluster("h800", 16)
    message = Message("all-to-all", tuple(range(16)), "", 16 << 20, 1 << 20)
    assert cluster.seconds(message) == pytest.approx(8 * 2**20 / 50e9)


@pytest.mark.parametrize("kind", list_clusters())
def test_built_in_clusters_load(kind: str) -> None:
    assert load_cluster(kind, 8).memory_bytes >= 80e9


def test_clusters_of_ones_own_and_changes(tmp_path) -> None:
    text = "[mine]\n" + "\n".join(
        f"{name} = {value}"
        for name, value in vars(load_cluster("h100", 1)).items()
        if name not in ("name", "num_gpus")
    )
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_cluster(str(path), 4, {"memory_bytes": 96e9}).memory_bytes == 96e9
    with pytest.raises(ValueError, match="--cluster 'h900': allowed are h100, h800"):
        load_cluster("h900", 4)
    with pytest.raises(ValueError, match="no memory"):
        load_cluster("h100", 4, {"memory": 1})
    path.write_text("[mine]\nmemory_bytes = 1")
    with pytest.raises(ValueError, match="missing"):
        load_cluster(str(path), 4)
