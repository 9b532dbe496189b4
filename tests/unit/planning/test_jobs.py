"""Fine-tuning, adapters, serving and reinforcement learning, planned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_k2.planning.cluster import Cluster, load_cluster
from megatron_k2.planning.command import main
from megatron_k2.planning.jobs import JOBS
from megatron_k2.planning.model import Model
from megatron_k2.planning.pieces import trace_pieces
from megatron_k2.planning.reinforcement import cycle
from megatron_k2.planning.search import Finalist, finish, search
from megatron_k2.planning.serving import Engine, Traffic, engines
from megatron_k2.planning.settings import MEMORY, Candidate

SEQUENCE, SHORT = 256, Traffic(prompt=128, response=128)
RESERVE = 6e9


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """Return four GPUs of which two share a node, so that there is a network."""
    return load_cluster("h200", 4, {"node_gpus": 2})


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> list[Engine]:
    """Return all engines of k2-nano."""
    return engines(Model("k2-nano"), cluster, SHORT, reserve_bytes=RESERVE)


def planned(cluster: Cluster, job: str) -> Finalist:
    """Return one layout of a job, built."""
    model = Model("k2-nano", JOBS[job].flags)
    one = Candidate(
        4, pp=2, ep=2, global_batch_size=16, seq_length=SEQUENCE, memory="keep",
        overlap=JOBS[job].overlap,
    )  # fmt: skip
    found = search(model, cluster, [one])
    assert found.number == len(found.fitting) == 1 and found.nearest is None
    finalist = finish(model, cluster, found.fitting[0])
    assert finalist.refusal == ""
    return finalist


def test_adapters_have_gradients_and_state_and_the_frozen_weights_none(cluster: Cluster) -> None:
    full, lora = planned(cluster, "sft"), planned(cluster, "lora")
    for guess, built in ((one.estimate.memory, one.built) for one in (full, lora)):
        for stage in built:  # what the search added up is what was built
            there = guess[stage.stages[0]]
            assert there.parameters == pytest.approx(stage.state.parameters, rel=0.01)
            assert there.gradients == pytest.approx(stage.state.gradients, rel=0.01)
    for all_of_it, adapters in zip(full.built, lora.built, strict=True):
        assert adapters.state.parameters > all_of_it.state.parameters
        added = adapters.num_weights - all_of_it.num_weights
        assert adapters.state.gradients == pytest.approx(4 * added, rel=0.01)
        assert adapters.state.optimizer < 0.2 * all_of_it.state.optimizer


def test_the_weights_of_a_model_are_counted_once_and_only_adapters_as_trained() -> None:
    full, lora = (Model("k2-nano", JOBS[job].flags).num_weights() for job in ("sft", "lora"))
    assert full[0] == full[1] and lora[0] == full[0] + lora[1] and 0 < lora[1] < 0.2 * full[0]


def test_frozen_weights_are_passed_through_and_not_differentiated() -> None:
    command = ["--k2-preset=k2-nano", "--bf16", "--num-layers=2", "--moe-layer-freq=[0,1]"]
    command += ["--lr=1e-3", "--micro-batch-size=1", "--global-batch-size=1", "--train-iters=1"]
    command += [f"--seq-length={SEQUENCE}", *MEMORY["keep"]]
    full, lora = (trace_pieces([*command, *JOBS[job].flags], 1) for job in ("sft", "lora"))
    for kind in ("dense", "moe"):
        works = [
            [sum(product.flops for product in products) for products in (one.forward, one.backward)]
            for one in (full[kind], lora[kind])
        ]
        assert works[0][1] == 2 * works[0][0]
        added = works[1][0] - works[0][0]  # of the adapters, whose weights have gradients
        assert works[1][0] + added <= works[1][1] < 1.5 * works[0][0] + 3 * added
        assert 0 < lora[kind].trained_numel[0] < 0.2 * lora[kind].dense_numel  # a small model


def test_an_engine_holds_all_weights_once_and_a_latent_a_token(served: list[Engine]) -> None:
    model = Model("k2-nano")
    pieces = model.pieces(Candidate(1, seq_length=SEQUENCE, memory="keep"), backward=False)
    whole = sum(
        2 * count * (pieces[kind].dense_numel + pieces[kind].expert_numel)
        for kind, count in model.counts().items()
    )
    alone = next(one for one in served if one.num_gpus == 1)
    # Matrices of layers in one byte and a scale a tile, all else in two.
    eight = sum(count * sum(pieces[kind].matrix_numel) for kind, count in model.counts().items())
    assert alone.weight_bytes == pytest.approx(whole - eight * (1 - 4 / 128**2), rel=1e-6)
    assert alone.token_bytes == 2 * model.latent_dim * model.num_layers
    assert alone.cached_tokens * alone.token_bytes < 141e9 - RESERVE - alone.weight_bytes
    spread = next(one for one in served if one.num_gpus == 4 and one.tp == 1)
    assert spread.weight_bytes < alone.weight_bytes
    assert all(one.decode_s >= one.parts_s["cache"] > 0 for one in served)
    rates = [one.answers_per_s(SHORT) for one in served]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.evidence  # 12 s of pricing
def test_more_requests_at_once_are_slower_each_and_faster_together(cluster: Cluster) -> None:
    model = Model("k2-nano")
    few, many = (
        engines(model, cluster, replace(SHORT, answers=n), reserve_bytes=RESERVE)
        for n in (64, 2048)
    )
    for size in {(one.num_gpus, one.tp) for one in few}:
        a, b = (next(one for one in some if (one.num_gpus, one.tp) == size) for some in (few, many))
        assert a.requests < b.requests and a.decode_s < b.decode_s
        assert a.decoded_per_s < b.decoded_per_s


def test_a_step_of_reinforcement_learning_adds_up(cluster: Cluster, served: list[Engine]) -> None:
    trainer = planned(cluster, "rl")
    shared, apart = (
        cycle(trainer, cluster, served[0], cluster, SHORT, colocated=where)
        for where in (True, False)
    )
    parts = shared.rollout_s + shared.train_s + shared.swap_s + shared.sync_s
    assert shared.step_s == shared.ahead_s == pytest.approx(parts) and shared.swap_s > 0
    assert apart.swap_s == 0 and apart.ahead_s < apart.step_s < shared.step_s
    whole = served[0].weight_bytes * served[0].num_gpus  # to both nodes, two links each
    assert shared.broadcast_s == pytest.approx(whole / (2 * cluster.network_bandwidth))
    assert shared.fits and shared.host_bytes > apart.host_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "memory_bytes=1e9"], "fits with one request"),
        (["--slowest", "1e9"], "is fast enough"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(arguments: list[str], message: str, capsys) -> None:
    command = ["--job", "serve", "--k2-preset", "k2-nano", "--gpus", "1", "--workers", "1"]
    assert main([*command, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_engines_are_a_table(capsys) -> None:
    command = ["--job", "serve", "--k2-preset", "k2-nano", "--gpus", "1", "--workers", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tokens/s a GPU" in printed and "vllm serve MODEL --tensor-parallel-size 1" in printed
