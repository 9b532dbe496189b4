"""An engine on paper: weights and latent cache of a GPU, and the least time of a token.

One instance of the engine spans some GPUs: attention is split over ``tp`` of them and copied to the
others, experts lie one after the other over all (as vLLM and SGLang serve Kimi K2: tensor, data and
expert parallelism). Linear layers, experts and messages are those of the modules that train, traced
without a backward pass: a prompt as one sequence, a step of decoding as one sequence of one token
a request. Attention over the cache is the one formula here, as no module of ours does it yet:
absorbed MLA, which reads a token's latent once (kv rank + rope, bf16). Bounds as in
``estimate.py``. Left out: pipeline parallelism, speculative tokens, prefixes shared by requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.model import FEW_TOKENS, Model, Progress
from megatron_k2.planning.pieces import Piece
from megatron_k2.planning.price import product_seconds
from megatron_k2.planning.settings import Candidate

BF16, FP8, SCALE, TILE = 2, 1, 4, 128 * 128
"""Bytes of a weight, of an FP8 weight, of the scale of a tile; weights of a tile."""
MOST_REQUESTS = 4096
"""On one attention replica; more change no bound."""


@dataclass(frozen=True)
class Traffic:
    """What is asked of an engine.

    Attributes:
        prompt: tokens of a request.
        response: tokens of its answer.
        weights: bf16 or fp8, as the engine stores and computes.
        answers: wanted at once of all GPUs; None: as many as fit.
    """

    prompt: int = 2048
    response: int = 2048
    weights: str = "fp8"
    answers: int | None = None


@dataclass(frozen=True)
class Engine:
    """One instance of an engine.

    Attributes:
        num_gpus: of the instance.
        tp: GPUs that share one replica of attention.
        ep: GPUs that share the experts.
        weight_bytes: of a GPU.
        transient_bytes: most that lives beside weights and cache, of a GPU.
        token_bytes: cache of one token, of a GPU.
        cached_tokens: that fit a GPU.
        requests: at once, on one replica of attention.
        prefill_s: least seconds of one prompt on one replica.
        decode_s: least seconds of one token of all requests.
        parts_s: weights and products, cache, messages; the last hide under the others of another
            half of the requests.
    """

    num_gpus: int
    tp: int
    ep: int
    weight_bytes: float
    transient_bytes: float
    token_bytes: int
    cached_tokens: int
    requests: int
    prefill_s: float
    decode_s: float
    parts_s: dict[str, float]

    @property
    def replicas(self) -> int:
        """Replicas of attention."""
        return self.num_gpus // self.tp

    @property
    def decoded_per_s(self) -> float:
        """Most tokens a second and GPU."""
        return self.requests / self.decode_s / self.tp

    @property
    def prefilled_per_s(self) -> float:
        """Most prompts a second and GPU."""
        return 1 / self.prefill_s / self.tp

    def answers_per_s(self, traffic: Traffic) -> float:
        """Return most requests a second and GPU, prompts and answers in turn."""
        return 1 / (1 / self.prefilled_per_s + traffic.response / self.decoded_per_s)


def engines(
    model: Model,
    cluster: Cluster,
    traffic: Traffic,
    *,
    reserve_bytes: float,
    progress: Progress = lambda _: None,
) -> list[Engine]:
    """Return every instance that fits, the most answers a GPU first.

    Args:
        model: with multi-head latent attention.
        cluster: what it runs on.
        traffic: what is asked.
        reserve_bytes: left free on a GPU.
        progress: is told what happens.

    Raises:
        ValueError: the model has no latent attention, or a length is not positive.
    """
    if not model.latent_dim:
        raise ValueError(f"--k2-preset {model.preset}: an engine is planned for MLA models only")
    if min(traffic.prompt, traffic.response) < 1:
        raise ValueError("--prompt-length and --response-length must be positive")
    sizes = _sizes(model, cluster)
    few = {size: _traced(size, FEW_TOKENS) for size in sizes}
    prompts = {size: _traced(size, traffic.prompt) for size in sizes}
    model.trace([*few.values(), *prompts.values()], progress, backward=False)
    held = {
        size: _held(model, cluster, traffic, few[size], prompts[size], reserve_bytes)
        for size in sizes
    }
    held = {size: one for size, one in held.items() if one.requests}
    steps = {size: _traced(size, one.requests) for size, one in held.items()}
    model.trace(steps.values(), progress, backward=False)
    found = [
        _engine(model, cluster, traffic, held[size], prompts[size], step)
        for size, step in steps.items()
    ]
    return sorted(found, key=lambda one: -one.answers_per_s(traffic))


Size = tuple[int, int, int]
"""GPUs of an instance, tp, ep."""


def _sizes(model: Model, cluster: Cluster) -> list[Size]:
    """Return the instances that sizes allow: whole GPUs, then whole nodes."""
    found: list[Size] = []
    heads, experts = model.shape["num_attention_heads"], model.shape["num_experts"]
    for gpus in (2**n for n in range(cluster.num_gpus.bit_length())):
        if cluster.num_gpus % gpus or (experts and experts % gpus):
            continue
        for tp in (2**n for n in range(min(gpus, 2 * cluster.node_gpus).bit_length())):
            if gpus % tp == 0 and heads % tp == 0 and (experts or tp == gpus):
                found.append((gpus, tp, gpus if experts else 1))
    return found


def _traced(size: Size, tokens: int) -> Candidate:
    """Return what is traced for some tokens on one replica of attention."""
    gpus, tp, ep = size
    whole = -(-tokens // (2 * tp)) * 2 * tp  # sequence parallelism splits them evenly
    return Candidate(gpus, tp=tp, ep=ep, seq_length=whole, memory="keep", global_batch_size=gpus)


@dataclass(frozen=True)
class _Held:
    """What a GPU of an instance holds."""

    size: Size
    weight_bytes: float
    transient_bytes: float
    token_bytes: int
    cached_tokens: int
    requests: int


def _held(
    model: Model,
    cluster: Cluster,
    traffic: Traffic,
    few: Candidate,
    prompt: Candidate,
    reserve_bytes: float,
) -> _Held:
    pieces = model.pieces(few, backward=False)
    weights = sum(
        _weight_bytes(pieces[kind], traffic.weights) * count
        for kind, count in model.counts().items()
    )
    transient = max(one.transient_bytes for one in model.pieces(prompt, backward=False).values())
    token = model.latent_dim * BF16 * model.num_layers
    room = cluster.memory_bytes - reserve_bytes - weights - transient
    tokens = max(int(room // token), 0)
    requests = min(tokens // (traffic.prompt + traffic.response), MOST_REQUESTS)
    if traffic.answers is not None:
        requests = min(requests, -(-traffic.answers * few.tp // cluster.num_gpus))
    size = (few.world_size, few.tp, few.ep)
    return _Held(size, weights, transient, token, tokens, requests)


def _weight_bytes(piece: Piece, weights: str) -> float:
    """Return the bytes of a piece's weights; FP8 ones have a scale a tile."""
    all_numel, matrices = piece.dense_numel + piece.expert_numel, sum(piece.matrix_numel)
    if weights == "bf16":
        return BF16 * all_numel
    return BF16 * (all_numel - matrices) + (FP8 + SCALE / TILE) * matrices


def _engine(
    model: Model,
    cluster: Cluster,
    traffic: Traffic,
    held: _Held,
    prompt: Candidate,
    step: Candidate,
) -> Engine:
    prefill = _forward(model, prompt, cluster, traffic.weights, with_attention=True)
    work, messages = _forward(model, step, cluster, traffic.weights, with_attention=False)
    cache = _cache_seconds(model, cluster, held, traffic)
    parts = {"weights and products": work, "cache": cache, "messages": messages}
    return Engine(
        *held.size, held.weight_bytes, held.transient_bytes, held.token_bytes, held.cached_tokens,
        held.requests, max(prefill), max(work + cache, messages), parts,
    )  # fmt: skip


def _forward(
    model: Model, candidate: Candidate, cluster: Cluster, weights: str, *, with_attention: bool
) -> tuple[float, float]:
    """Return seconds of products and of messages of one pass through the model."""
    pieces = model.pieces(candidate, backward=False)
    work = messages = 0.0
    for kind, count in model.counts().items():
        piece = pieces[kind]
        work += count * _linear_seconds(piece, cluster, weights)
        if with_attention:
            products = [one for one in piece.forward if not one.has_weight]
            work += count * product_seconds(products, cluster.bf16_flops, cluster.memory_bandwidth)
        messages += count * sum(cluster.seconds(one) for one in piece.forward_messages)
    return work, messages


def _linear_seconds(piece: Piece, cluster: Cluster, weights: str) -> float:
    """Return the seconds of a piece's products with weights; FP8 ones are half as many bytes."""
    products = [one for one in piece.forward if one.has_weight]
    rate, bandwidth = cluster.bf16_flops, cluster.memory_bandwidth
    if weights == "fp8" and piece.kind in ("dense", "moe"):
        read = sum(one.bytes for one in products)
        saved = (BF16 - FP8) * sum(piece.matrix_numel)
        rate, bandwidth = cluster.fp8_flops, bandwidth * read / (read - saved)
    return product_seconds(products, rate, bandwidth)


def _cache_seconds(model: Model, cluster: Cluster, held: _Held, traffic: Traffic) -> float:
    """Return the seconds of absorbed attention of one token of all requests, in all layers."""
    tokens = held.requests * (traffic.prompt + traffic.response / 2)  # on average
    heads = model.shape["num_attention_heads"] / held.size[1]
    flops = 2 * heads * tokens * (model.latent_dim + model.kv_rank)
    read = tokens * model.latent_dim * BF16
    each = max(flops / cluster.bf16_flops, read / cluster.memory_bandwidth)
    return each * model.num_layers
