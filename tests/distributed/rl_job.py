"""The loss of a batch in this layout's ranks, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SEQ_LENGTH, VOCABULARY = 64, 96
LENGTHS = (30, 9, 23, 12, 40, 17)


def samples() -> list[Any]:
    """Episodes of random ids with made-up behaviour, the same everywhere."""
    from megatron_k2.rl.rows import Sample

    dice = np.random.default_rng(3)
    found = []
    for number, length in enumerate(LENGTHS):
        learned = np.arange(length) >= 4
        log_probs = np.where(learned, -3 - dice.random(length), 0.0)
        ids = dice.integers(VOCABULARY, size=length)
        advantage, weight = 0.4 * number - 1.0, 1 / len(LENGTHS)
        found.append(Sample(ids, learned, log_probs, learned, advantage, weight))
    return found


def loss_and_gradients(cp: int) -> dict[str, Any]:
    """Return loss, reported sums and gradients, over all context-parallel ranks."""
    from megatron_k2 import parallel
    from megatron_k2.rl.batch_loss import ForwardStep, make_batch
    from megatron_k2.rl.rows import episode_rows, ptx_row
    from megatron_k2.rl.run_tables import Objective
    from tests.unit.engine.small_models import randomise_
    from tests.unit.model.tiny import build_model, tiny_config

    torch.set_num_threads(1)
    config = tiny_config(context_parallel_size=cp, moe_token_dispatcher_type="alltoall")
    model = randomise_(build_model(config, VOCABULARY), 4)
    groups = parallel.get_pg_collection()
    text = [(np.arange(50) % VOCABULARY, np.ones(50))]
    given = samples()
    rows = episode_rows(given, SEQ_LENGTH)
    batch = make_batch(given, rows, [ptx_row(text, SEQ_LENGTH)], SEQ_LENGTH, 1, 0.5)
    step = ForwardStep(batch, Objective(tau=0.2, replay_routing=False), 0, groups)
    left = iter(list(enumerate(batch.rows)))
    sums: dict[str, torch.Tensor] = {}
    for _ in batch.rows:
        output, loss_of = step(left, model)
        part, _, report = loss_of(output)
        part.backward()
        for name, value in report.items():
            sums[name] = sums.get(name, torch.zeros(())) + value[0]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for tensor in (*sums.values(), *gradients.values()):  # as Megatron adds them up
        torch.distributed.all_reduce(tensor, group=groups.cp)
    return {
        "sums": {name: float(value) for name, value in sums.items()},
        "gradients": {name: one.double().numpy() for name, one in gradients.items()},
    }


def by_schedule(pp: int) -> dict[str, Any]:
    """Return reported sums (of the last stage) and this stage's gradients, by Megatron's schedule.

    Names are those of the whole model; stages hold two layers each.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_k2 import parallel
    from megatron_k2.model.specs import get_k2_layer_specs
    from megatron_k2.rl.batch_loss import ForwardStep, make_batch
    from megatron_k2.rl.rows import episode_rows
    from megatron_k2.rl.run_tables import Objective
    from tests.unit.engine.small_models import randomise_
    from tests.unit.model.tiny import build_model, tiny_config

    torch.set_num_threads(1)
    groups = parallel.get_pg_collection()
    fields: dict[str, Any] = dict(num_layers=4, moe_layer_freq=[0, 1, 1, 1])
    weights = randomise_(build_model(tiny_config(**fields), VOCABULARY), 4).state_dict()
    config = tiny_config(
        **fields,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
    )
    stage = groups.pp.rank()
    model = GPTModel(
        config, get_k2_layer_specs(config), VOCABULARY, 512, position_embedding_type="rope",
        pre_process=stage == 0, post_process=stage == pp - 1,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip

    def named(name: str) -> str:
        head, dot, rest = name.partition("decoder.layers.")
        number, _, last = rest.partition(".")
        return f"{head}{dot}{int(number) + 2 * stage}.{last}" if dot else name

    model.load_state_dict({name: weights[named(name)] for name in model.state_dict()})
    given = samples()
    batch = make_batch(given, episode_rows(given, SEQ_LENGTH), [], SEQ_LENGTH, 1, 0.0)
    reports = get_forward_backward_func()(
        forward_step_func=ForwardStep(batch, Objective(tau=0.2, replay_routing=False), 0, groups),
        data_iterator=iter(list(enumerate(batch.rows))),
        model=[model],
        num_microbatches=len(batch.rows),
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    sums: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            sums[name] = sums.get(name, 0.0) + float(value[0])
    gradients = {named(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "sums": sums,
        "gradients": {name: one.double().numpy() for name, one in gradients.items()},
    }
