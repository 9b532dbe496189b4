"""The overlapped expert-parallel schedule in bf16 on gloo; weight gradients that really wait."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.matrix import VPP2, Curve, merge
from tests.distributed.pool import Pool

JOBS = "tests.distributed.overlap_job:"
LAYOUTS = {
    "EP2": (2, dict(expert_model_parallel_size=2)),
    "EP2 x PP2 x VPP2": (4, {**VPP2, "expert_model_parallel_size": 2}),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": dict(overlap_moe_expert_parallel_comm=True),
    "delayed": dict(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True),
}
NUM_STEPS = 2


@pytest.fixture(scope="module")
def start(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bf16 checkpoint and the routing of a single-process run from it."""
    folder: Path = tmp_path_factory.mktemp("overlap")
    run = dict(
        checkpoint=str(folder / "start"), routing=str(folder / "routing.pt"),
        num_steps=NUM_STEPS, bf16=True,
    )  # fmt: skip
    first = dict(run, save_initial=True, record=True)
    pool.run("tests.distributed.training_job:train", 1, kwargs=dict(run=first))
    return run


class Runs:
    """Curve and the last step's events (rank 0) of a schedule under a layout, each run once."""

    def __init__(self, pool: Pool, start: dict[str, Any]) -> None:
        self.pool, self.start = pool, start
        self.found: dict[tuple[str, str], tuple[Curve, list[str]]] = {}

    def __getitem__(self, case: tuple[str, str]) -> tuple[Curve, list[str]]:
        if case not in self.found:
            layout, schedule = case
            world_size, sizes = LAYOUTS[layout]
            what = dict(
                run=dict(self.start, layout=sizes, digest=True), overrides=SCHEDULES[schedule]
            )
            ranks = self.pool.run(JOBS + "train_overlapped", world_size, kwargs=what)
            self.found[case] = (merge(ranks), ranks[0]["events"])
        return self.found[case]


@pytest.fixture(scope="module")
def runs(pool: Pool, start: dict[str, Any]) -> Runs:
    return Runs(pool, start)


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        ("EP2", "overlapped"),
        ("EP2", "delayed"),
        # The delayed one contains it.
        pytest.param("EP2 x PP2 x VPP2", "overlapped", marks=pytest.mark.evidence),
        ("EP2 x PP2 x VPP2", "delayed"),
    ],
)
def test_overlapped_schedule_gives_the_plain_runs_losses_and_gradients(runs, layout, schedule):
    plain, curve = runs[layout, "plain"][0], runs[layout, schedule][0]
    assert curve.losses == plain.losses
    assert curve.losses[-1] < curve.losses[0]
    assert curve.grad_norms == plain.grad_norms
    assert curve.gradient_digests == plain.gradient_digests
    assert curve.weight_digests == plain.weight_digests


def last_backward(events: list[str]) -> list[str]:
    """Return the events of the step's next to last microbatch: overlapped with a forward."""
    starts = [i for i, event in enumerate(events) if event == "output_layer.weight"]
    return events[starts[-2] : starts[-1]]


def test_another_microbatch_sends_during_the_backward_pass(runs):
    plain, overlapped = (last_backward(runs["EP2", name][1]) for name in ("plain", "overlapped"))
    backward = plain[: plain.index("embedding.word_embeddings.weight")]
    assert "send forward" not in backward and "send backward" in backward
    backward = overlapped[: overlapped.index("embedding.word_embeddings.weight")]
    assert backward.count("send forward") == backward.count("send backward") == 9  # 3 x 3 layers


@pytest.mark.parametrize("layer", range(4))
def test_attention_and_shared_expert_weight_gradients_come_after_the_backward_pass(runs, layer):
    prefix = f"decoder.layers.{layer}."
    waits = ["self_attention.linear_proj.weight", "self_attention.linear_q_up_proj.weight"]
    if layer:
        waits += ["mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"]
    for schedule, delayed in (("overlapped", False), ("delayed", True)):
        events = last_backward(runs["EP2", schedule][1])
        end = events.index(prefix + "input_layernorm.weight")  # the last gradient of a backward
        for name in waits:
            assert (events.index(prefix + name) > end) is delayed, (schedule, name)


def test_expert_weight_gradients_wait_for_the_next_microbatchs_dispatch(runs):
    for schedule, before in (("overlapped", "send backward"), ("delayed", "send forward")):
        events = last_backward(runs["EP2", schedule][1])
        for layer in (1, 2):
            names = [f"decoder.layers.{layer}.mlp.experts.linear_fc{n}.weight" for n in (1, 2)]
            first = min(events.index(name) for name in names)
            assert events[first - 1] == before, (schedule, layer)


def test_nothing_is_delayed_that_is_not_asked_for(runs):
    plain, overlapped = (last_backward(runs["EP2", name][1]) for name in ("plain", "overlapped"))
    weights = [[event for event in events if "send" not in event] for events in (plain, overlapped)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_delayed_layers_equal_the_stock_ones_bit_for_bit(pool: Pool, sequence_parallel):
    ranks = pool.run(
        JOBS + "stock_and_delayed_gradients", 2, layout=dict(tensor_model_parallel_size=2),
        kwargs=dict(sequence_parallel=sequence_parallel),
    )  # fmt: skip
    for found in ranks:
        assert found["early"] == []
        assert len(found["equal"]) == 6 and all(found["equal"])
        before_backward, without_ddp_flag = found["refusals"]
        assert "backward_dw before any backward pass" in before_backward
        assert "delay_wgrad_compute is False" in without_ddp_flag


ARGUMENTS = [
    "--k2-preset", "k2-micro", "--micro-batch-size", "1", "--global-batch-size", "4",
    "--train-iters", "1", "--lr", "1e-3", "--mock-data", "--tokenizer-type", "NullTokenizer",
    "--expert-model-parallel-size", "2", "--transformer-impl", "local",
    "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute",
]  # fmt: skip


def test_command_line_delays_without_transformer_engine(pool: Pool):
    found = pool.run(JOBS + "validated_arguments", 2, kwargs=dict(argv=[*ARGUMENTS, "--bf16"]))
    assert found == [{"overlap": True, "delay": True, "impl": "local"}] * 2


def test_command_line_refuses_the_overlap_in_fp32(pool: Pool):
    argv = [*ARGUMENTS, "--k2-precision", "fp32"]
    for message in pool.run(JOBS + "validated_arguments", 2, kwargs=dict(argv=argv)):
        assert "--overlap-moe-expert-parallel-comm" in message
        assert "--bf16" in message
