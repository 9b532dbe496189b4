"""The local engine against Hugging Face ``generate`` on the same weights, prompts and threads.

``.venv/bin/python tools/bench/generate.py`` builds transformers' DeepseekV3 at the shape of a
preset in fp32, copies its weights into the Megatron model, and gives both the same batch of
prompts, greedy, with a key-value cache each; in turns, so that other work on the machine hits
both. transformers runs with each of its experts implementations that is worth it (its own default,
grouped_mm, and eager); the bar, 3 times its tokens a second, is against the faster. Beside the
clock the table has the CPU seconds of the process, which other work disturbs less. Greedy answers
are compared token by token. Host only; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402

BAR = 3.0  # of the issue, at batch 32
PEERS = ("grouped_mm", "eager")  # batched_mm copies each row's experts: several times slower
WEIGHT_SPREAD = 2.0  # times the initial weights: probabilities far enough apart to compare ids

Answers = list[list[int]]


def build_models(preset: str) -> tuple[Any, Any]:
    """Return (Megatron model, transformers model) with the same fp32 weights, in eval mode."""
    import transformers
    from contestants import parsed_args, start_single_process
    from hf_weights import to_megatron_

    args = parsed_args(preset, 1, 512)
    start_single_process()
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.model.specs import get_k2_layer_specs
    from megatron_k2.presets import load_preset
    from megatron_k2.presets.hf_config import hf_config

    args.params_dtype, args.bf16 = torch.float32, False
    config = core_transformer_config_from_args(args)
    torch.manual_seed(0)
    fields = hf_config(load_preset(preset))
    peer = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**fields, attn_implementation="sdpa")
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WEIGHT_SPREAD)
    model = GPTModel(
        config,
        get_k2_layer_specs(config),
        vocab_size=args.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    )
    to_megatron_(model, peer.state_dict())
    return model.eval(), peer


def engine_run(model: Any, prompts: torch.Tensor, new_tokens: int) -> Callable[[], Answers]:
    """Return a function that answers all prompts with a fresh local engine."""
    from megatron_k2.engine.base import Completion, Request, Sampling
    from megatron_k2.engine.core import LocalCore
    from megatron_k2.engine.scheduler import Limits

    batch, length = prompts.shape
    context = length + new_tokens
    limits = Limits(
        context, batch * (context + 16), max_running=batch, step_tokens=max(2048, batch + 1)
    )
    rules = Sampling(new_tokens, temperature=0.0)
    requests = [Request(str(n), tuple(row.tolist()), rules) for n, row in enumerate(prompts)]
    core = LocalCore(model, limits)

    def run() -> Answers:
        found = {request.id: Completion(request) for request in requests}
        for request in requests:
            core.add(request)
        while core.has_work:
            for name, piece in core.step():
                found[name].add(piece)
        return [found[request.id].ids for request in requests]

    return run


def peer_run(
    peer: Any, experts: str, prompts: torch.Tensor, new_tokens: int
) -> Callable[[], Answers]:
    """Return a function that answers all prompts with transformers' ``generate``."""

    @torch.inference_mode()
    def run() -> Answers:
        for module in peer.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = experts
        output = peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, use_cache=True,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        answers: Answers = output[:, prompts.shape[1] :].tolist()
        return answers

    return run


def timed(run: Callable[[], Answers]) -> tuple[float, float, Answers]:
    """Return seconds by the clock, CPU seconds of the process, and the answers."""
    start, cpu = time.perf_counter(), time.process_time()
    answers = run()
    return time.perf_counter() - start, time.process_time() - cpu, answers


def equal_share(ours: Answers, theirs: Answers) -> float:
    """Return the share of tokens that are equal, place by place."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    """Run all contestants in turns; print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
        model, peer = build_models(options.preset)
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.prompt_tokens)
    prompts = torch.randint(0, peer.config.vocab_size, shape, generator=generator)
    runs = {"k2": engine_run(model, prompts, options.new_tokens)}
    runs |= {f"hf {one}": peer_run(peer, one, prompts, options.new_tokens) for one in PEERS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    answers: dict[str, Answers] = {}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            seconds, cpu, answers[name] = timed(run)
            if repeat:  # the first warms up
                times[name].append((seconds, cpu))
    report(options, times, answers)


def report(options: Any, times: dict[str, list[tuple[float, float]]], answers: Any) -> None:
    """Print tokens a second, ratios and the share of equal tokens."""
    count = options.batch * options.new_tokens
    speeds = {
        name: [count / statistics.median(column) for column in zip(*found, strict=True)]
        for name, found in times.items()
    }
    ours = speeds["k2"]
    figures: dict[str, Any] = {"tokens_per_s": ours[0], "tokens_per_cpu_s": ours[1]}
    rows: list[tuple[object, ...]] = []
    for name, (speed, cpu_speed) in speeds.items():
        ratio, cpu_ratio = ours[0] / speed, ours[1] / cpu_speed
        equal = equal_share(answers["k2"], answers[name])
        rows.append(
            (
                name,
                f"{speed:.0f}",
                f"{cpu_speed:.0f}",
                f"{ratio:.2f}",
                f"{cpu_ratio:.2f}",
                f"{100 * equal:.1f} %",
            )
        )
        key = name.replace(" ", "_")
        figures |= {f"{key}_tokens_per_s": speed, f"{key}_equal_tokens": equal}
    best = max(speed[0] for name, speed in speeds.items() if name != "k2")
    best_cpu = max(speed[1] for name, speed in speeds.items() if name != "k2")
    figures |= {"vs_hf_generate": ours[0] / best, "vs_hf_generate_cpu": ours[1] / best_cpu}
    title = (
        f"{options.preset}, {options.batch} prompts of {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new ones each, fp32, {THREADS} threads, median of {options.repeats}"
    )
    header = ("engine", "tokens/s", "tokens/CPU s", "k2 is faster", "by CPU", "same tokens")
    print_table(title, header, rows)
    verdict = "ok" if figures["vs_hf_generate"] >= BAR else "FAILS"
    print(f"  against the faster peer {figures['vs_hf_generate']:.2f}, bar >= {BAR:g}: {verdict}")
    load = os.getloadavg()[0]
    print_json(threads=THREADS, load_average=load, seconds=times, **figures)


if __name__ == "__main__":
    main()
