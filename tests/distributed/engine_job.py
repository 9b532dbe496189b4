"""The local engine over several ranks: the leader's answers and the ranks' own full forward."""

from __future__ import annotations

from typing import Any

import torch

from megatron_k2.engine.base import Completion
from tests.unit.engine.small_models import LIMITS, VOCABULARY, request_of

LENGTHS = (1, 5, 17, 40)


def answers(tp: int, ep: int, etp: int = 1) -> dict[str, Any] | None:
    """Run an engine over all ranks, change its weights once; the leader returns what it saw."""
    from megatron_k2 import parallel
    from megatron_k2.engine.ranks import RankedCore
    from tests.unit.model.tiny import build_model, tiny_config

    torch.set_num_threads(1)
    config = tiny_config(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp, num_moe_experts=6, q_lora_rank=28, kv_lora_rank=24,
        moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    torch.manual_seed(5)
    model = build_model(config, VOCABULARY + 1)  # even: cut over two ranks
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.eval()

    def change(version: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * version)

    core = RankedCore(model, LIMITS, parallel.get_pg_collection(), change=change)
    if not core.is_leader:
        core.follow()
        return _expected(model, torch.distributed.get_rank())
    requests = [request_of(f"r{n}", n, top_log_probs=VOCABULARY, max_tokens=4) for n in LENGTHS]
    found = {request.id: Completion(request) for request in requests}
    core.change_weights(3)
    core.add(request_of("gone", 9))
    for request in requests:
        core.add(request)
    core.step()  # one token each that is dropped from the comparison below
    core.abort("gone")
    for request in requests:
        core.abort(request.id)
    core.step()
    for request in requests:
        core.add(request)
    while core.has_work:
        for name, piece in core.step():
            found[name].add(piece)
    core.close()
    result = [([*one.request.prompt, *one.ids], one.top, one.versions) for one in found.values()]
    torch.distributed.broadcast_object_list([[one[0] for one in result]], src=0)
    return {"error": _error(model, result), "versions": result[0][2]}


def _expected(model: Any, rank: int) -> None:
    """Take part in the leader's full forward passes."""
    box: list[Any] = [None]
    torch.distributed.broadcast_object_list(box, src=0)
    for tokens in box[0]:
        _full(model, tokens)


@torch.no_grad()
def _full(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] by Megatron's modules, on every rank."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    ids = torch.tensor([tokens])
    logits = model(ids, torch.arange(ids.shape[1])[None], None)
    return torch.log_softmax(gather_from_tensor_model_parallel_region(logits)[0].float(), -1)


def _error(model: Any, result: list[Any]) -> float:
    worst = 0.0
    for tokens, top, _ in result:
        rows = _full(model, tokens)[len(tokens) - 1 - len(top) : -1]
        for row, alternatives in zip(rows, top, strict=True):
            worst = max(worst, *(abs(value - float(row[one])) for one, value in alternatives))
    return worst
