"""K2's attention on the CPU: against torch's kernels, and the cost of the exact largest logits.

``.venv/bin/python tools/bench/attention.py`` times forward and backward of the core attention at
Kimi K2's head widths (q/k 192, v 128) in bf16 against ``scaled_dot_product_attention``, with v at
its own width and zero-padded; then a training step (forward and backward) of a preset at 512 and
4,096 tokens with and without the record of each head's largest logit. Bar: at most 10 % of the
step. Host only; nothing here ran on a GPU.
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

THREADS = len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402
from torch.nn.functional import pad, scaled_dot_product_attention  # noqa: E402

WIDTHS = (192, 128)
MAX_OVERHEAD_PERCENT = 10.0


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``run`` in milliseconds, after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def attention_times(tokens: int, batch: int, heads: int, repeats: int) -> dict[str, float]:
    """Time forward and backward of three causal attentions at K2's head widths, in ms."""
    from megatron_k2.model.tiled_attention import tiled_causal_attention

    qk, v_width = WIDTHS
    shapes = [(tokens, batch * heads, width) for width in (qk, qk, v_width)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    upstream = torch.randn(tokens, batch * heads, v_width, dtype=torch.bfloat16)

    def torchs(padding: int) -> torch.Tensor:
        parts = (x.unflatten(1, (batch, heads)).permute(1, 2, 0, 3) for x in (q, k, v))
        query, key, value = parts
        value = pad(value, [0, padding])
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
        return output[..., :v_width].permute(2, 0, 1, 3).flatten(1, 2)

    def step(output: torch.Tensor) -> None:
        torch.autograd.grad(output, (q, k, v), upstream)

    scale = qk**-0.5
    return {
        "k2": median_ms(lambda: step(tiled_causal_attention(q, k, v, scale)[0]), repeats),
        "sdpa_padded": median_ms(lambda: step(torchs(qk - v_width)), repeats),
        "sdpa_unpadded": median_ms(lambda: step(torchs(0)), repeats),
    }


def step_overhead(preset: str, tokens: int, sequences: int, repeats: int) -> dict[str, float]:
    """Time a step with and without the record, in turn; ms, and the difference in percent."""
    from contestants import parsed_args
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.max_logit import MaxLogitRecord
    from megatron_k2.model.specs import get_k2_layer_specs

    args = parsed_args(preset, sequences, tokens)
    config = core_transformer_config_from_args(args)
    model = GPTModel(
        config,
        get_k2_layer_specs(config),
        vocab_size=args.vocab_size,
        max_sequence_length=tokens,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    ).bfloat16()
    ids = torch.randint(0, args.vocab_size, (sequences, tokens))
    positions = torch.arange(tokens).expand(sequences, tokens)
    records = [m for m in model.modules() if isinstance(m, MaxLogitRecord)]

    def step(record: bool) -> float:
        for leaf in records:
            leaf.records_max_logits = record
        start = time.perf_counter()
        model(ids, positions, None, labels=ids).float().mean().backward()
        return 1e3 * (time.perf_counter() - start)

    step(True)
    pairs = [(step(True), step(False)) for _ in range(repeats)]
    with_record, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    percent = statistics.median(100 * (a - b) / b for a, b in pairs)
    return {"with_ms": with_record, "without_ms": without, "overhead_percent": percent}


def main() -> None:
    """Run both measurements and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    from contestants import start_single_process

    figures: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for tokens, batch in ((512, 4), (4096, 1)):
        times = attention_times(tokens, batch, options.heads, max(1, options.repeats // 2))
        figures |= {f"attention_{name}_ms_{tokens}": ms for name, ms in times.items()}
        for peer in ("sdpa_padded", "sdpa_unpadded"):
            ratio = times[peer] / times["k2"]
            figures[f"vs_{peer}_{tokens}"] = ratio
            against = f"{peer} {times[peer]:.0f} ms"
            rows.append(
                (
                    f"{batch} x {tokens} tokens",
                    f"{times['k2']:.0f} ms",
                    against,
                    f"{ratio:.2f}",
                    "none",
                )
            )
    print_table(
        f"attention at head widths 192 and 128, forward and backward, {THREADS} threads",
        ("figure", "k2", "peer", "ratio", "bar"),
        rows,
    )
    import megatron_k2

    megatron_k2.register("cpu")
    start_single_process()
    rows = []
    for tokens, sequences in ((512, 4), (4096, 1)):
        with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
            found = step_overhead(options.preset, tokens, sequences, options.repeats)
        figures |= {f"max_logit_{name}_{tokens}": value for name, value in found.items()}
        percent = found["overhead_percent"]
        verdict = "ok" if percent <= MAX_OVERHEAD_PERCENT else "FAILS"
        times_ms = (f"{found['with_ms']:.0f} ms", f"without {found['without_ms']:.0f} ms")
        bar = f"<= {MAX_OVERHEAD_PERCENT:.0f} %"
        name = f"{sequences} x {tokens} tokens"
        rows.append((name, *times_ms, f"{percent:+.1f} %", bar, verdict))
    print_table(
        f"a step of {options.preset} with the largest logits (ratio: median over pairs of steps)",
        ("figure", "k2", "peer", "ratio", "bar", ""),
        rows,
    )
    print_json(preset=options.preset, threads=THREADS, **figures)


if __name__ == "__main__":
    main()
