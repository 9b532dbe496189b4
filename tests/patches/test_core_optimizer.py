"""The optimizer patches change what they claim, on objects of upstream's own classes.

Whole trainings that save and resume are in tests/distributed/test_resume.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megatron_k2
from megatron_k2.patches.megatron_core import (
    adam_state_dict,
    adam_step_count,
    adam_step_is_no_shard,
    adam_step_load,
    chained_optimizer_count,
)

megatron_k2.register("cpu")

IDENTIFIERS = dict(wd_mult=1.0, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False)


def _optimizer(steps: int = 0, num_params: int = 2) -> Any:
    """Return a DistributedOptimizer without buffers over torch's AdamW that took some steps."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer = object.__new__(DistributedOptimizer)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(num_params)]
    group = dict(params=params, **IDENTIFIERS)
    optimizer.optimizer = torch.optim.AdamW([group] if params else [dict(group, params=[])])
    optimizer.optimizer.register_step_post_hook(adam_step_count.count_step)
    optimizer.config = OptimizerConfig(optimizer="adam")
    optimizer.ddp_config = DistributedDataParallelConfig()
    optimizer.grad_scaler, optimizer.gbuf_ranges = None, []
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.optimizer.step()
    return optimizer


def test_state_dict_before_the_first_step_says_step_0() -> None:
    optimizer = _optimizer()
    assert optimizer.state_dict()["optimizer"]["param_groups"][0]["step"] == 0
    with pytest.raises(AssertionError):
        adam_state_dict.PATCH.original()(optimizer)


@pytest.mark.parametrize("num_params", [2, 0])
def test_step_is_known_on_a_rank_with_and_without_a_shard(num_params: int) -> None:
    optimizer = _optimizer(steps=5, num_params=num_params)
    (group,) = optimizer.state_dict()["optimizer"]["param_groups"]
    assert group["step"] == 5 and "params" not in group


def test_real_optimizer_counts_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched constructor installs the counter on torch's Adam and on nothing else."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def construct(self: Any, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    wrapped = adam_step_count.PATCH.replacement(construct)
    for kind, counts in ((torch.optim.AdamW, True), (torch.optim.SGD, False)):
        inner = kind([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        wrapped(object.__new__(DistributedOptimizer), inner)
        inner.param_groups[0]["params"][0].grad = torch.ones(1)
        inner.step()
        assert (inner.param_groups[0].get("step") == 1) is counts


def test_every_parameter_has_a_step_of_its_own_after_a_load() -> None:
    """Upstream's shared tensor makes three parameters count three steps at once."""
    steps_after_one_more = {}
    for name, load in (
        ("patched", lambda o, s: o.load_state_dict(s)),
        ("upstream", adam_step_load.PATCH.original()),
    ):
        optimizer = _optimizer(steps=2, num_params=3)
        for group in optimizer.optimizer.param_groups:
            group.update(fused=False, foreach=False)
        load(optimizer, _optimizer(steps=2, num_params=3).state_dict())
        params = optimizer.optimizer.param_groups[0]["params"]
        for param in params:
            param.grad = torch.ones(3)
        optimizer.optimizer.step()
        states = optimizer.optimizer.state
        steps_after_one_more[name] = [states[param]["step"].item() for param in params]
    assert steps_after_one_more["patched"] == [3.0, 3.0, 3.0]
    assert steps_after_one_more["upstream"] == [5.0, 5.0, 5.0], "delete adam-step-load"


def test_loaded_shards_need_no_step() -> None:
    optimizer = _optimizer(steps=1, num_params=1)
    (main,) = optimizer.optimizer.param_groups[0]["params"]
    optimizer.model_param_group_index_map = {main: (0, 0)}
    shards = {key: torch.full((3,), 7.0) for key in ("param", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(main, dict(shards))
        assert main.tolist() == optimizer.optimizer.state[main]["exp_avg"].tolist() == [7.0] * 3
        assert optimizer.optimizer.state[main]["step"].item() == 1
        with pytest.raises(KeyError, match="step"):
            adam_step_is_no_shard.PATCH.original()(optimizer, main, shards)


def _saved(step: int, *is_expert: bool) -> dict[str, Any]:
    groups = [dict(IDENTIFIERS, is_expert_parallel=flag, step=step) for flag in is_expert]
    kind = {"param_state_sharding_type": "fully_reshardable"}
    return {"optimizer": {"param_groups": groups}, **kind}


def _flags(entry: dict[str, Any]) -> set[bool]:
    return {group["is_expert_parallel"] for group in entry["optimizer"]["param_groups"]}


def test_two_optimizers_state_becomes_one() -> None:
    merged = {0: _saved(9, False), 1: _saved(9, True), "param_state": {0: "tensors"}}
    (entry,) = chained_optimizer_count.redistribute(merged, 1)
    assert entry["param_state"] == {0: "tensors"} and _flags(entry) == {False, True}
    assert {group["step"] for group in entry["optimizer"]["param_groups"]} == {9}


def test_one_optimizers_state_serves_dense_and_expert_parameters() -> None:
    merged = {**_saved(9, False), 0: {"param_state": "dense"}, 1: {"param_state": "expert"}}
    dense, expert = chained_optimizer_count.redistribute(merged, 2)
    assert (dense["param_state"], expert["param_state"]) == ("dense", "expert")
    assert _flags(expert) == {False, True}
    assert 0 not in dense and 1 not in expert


def test_a_saved_group_wins_over_the_twin_made_for_it() -> None:
    merged = {0: _saved(9, False), 1: _saved(9, True)}
    merged[0]["optimizer"]["param_groups"][0]["lr"] = 0.1
    merged[1]["optimizer"]["param_groups"][0]["lr"] = 0.2
    merged[0]["param_state"] = merged[1]["param_state"] = {}
    for entry in chained_optimizer_count.redistribute(merged, 2):
        last = {g["is_expert_parallel"]: g["lr"] for g in entry["optimizer"]["param_groups"]}
        assert last == {False: 0.1, True: 0.2}
