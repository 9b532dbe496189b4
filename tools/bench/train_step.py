"""Tokens/s and peak memory of a training step of k2-nano on the CPU, against two peers.

``.venv/bin/python tools/bench/train_step.py`` times our spec, stock Megatron-Core local modules and
transformers' DeepseekV3 in turn, a process each, equal threads, weights and batches; then the bare
matrix products and attention at the same shapes, and the machine's bf16 GEMM rate. Of transformers'
experts implementations the fastest takes part; each is timed alone first, because one of them needs
10 GB and 20 s a step and would slow the others down. Losses must agree after five steps.
Bars: at least 2x Megatron, 3x transformers, 15 % of the GEMM rate, 50 % of the floor's speed.
Host only; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402

from megatron_k2.presets import load_preset  # noqa: E402
from megatron_k2.presets.hf_config import hf_config  # noqa: E402

HERE = Path(__file__).parent
HF_EXPERTS = ("grouped_mm", "batched_mm", "eager")
BARS = {"vs_megatron_local": 2.0, "vs_hf": 3.0, "mfu_vs_gemm": 0.15, "of_floor": 0.5}
SCREENING_STEPS = 3
LOSS_STEP = 5
LOSS_TOLERANCE = {"megatron": 2e-3, "hf": 2e-2}
"""Nats at that step: bf16 rounding in another order; transformers trains without fp32 masters."""


class Contestant:
    """A training step in a process of its own, driven over pipes."""

    def __init__(self, name: str, options: argparse.Namespace, weights: Path) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        sizes = (options.preset, str(options.sequences), str(options.tokens), str(weights))
        root = HERE.parents[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py"), name, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self._answer()

    def step(self, index: int, profile: str = "") -> dict[str, Any]:
        """Run one training step on microbatch ``index``; seconds, loss and peak memory.

        Args:
            index: which batch.
            profile: "kernels" or "adaptation" for those times, see ``contestants.py``.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"index": index, "profile": profile}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"contestant {self.name} ended:\n{self.log.read()[-3000:]}")


def shared_weights(preset: str, path: Path) -> None:
    """Write a freshly initialised Hugging Face state dict."""
    import transformers

    torch.manual_seed(1234)
    config = transformers.DeepseekV3Config(**hf_config(load_preset(preset)))
    torch.save(transformers.DeepseekV3ForCausalLM(config).state_dict(), path)


def macs_per_token(preset: str, tokens: int) -> dict[str, float]:
    """Return multiply-accumulates of one token's forward pass, by kind; causal attention."""
    get = load_preset(preset).value
    h, layers, heads = (int(get(n)) for n in ("hidden_size", "num_layers", "num_attention_heads"))
    ql, kvl = int(get("q_lora_rank")), int(get("kv_lora_rank"))
    nope, rope, value = (int(get(n)) for n in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
    moe, shared = int(get("moe_ffn_hidden_size")), int(get("moe_shared_expert_intermediate_size"))
    experts, topk = int(get("num_experts")), int(get("moe_router_topk"))
    dense = str(get("moe_layer_freq")).count("[0]")
    projections = h * ql + ql * heads * (nope + rope) + h * (kvl + rope)
    projections += kvl * heads * (nope + value) + heads * value * h
    return {
        "projections": layers * projections,
        "attention": layers * heads * (nope + rope + value) * (tokens + 1) / 2,
        "feed-forward": dense * 3 * h * int(get("ffn_hidden_size"))
        + (layers - dense) * (h * experts + 3 * h * (topk * moe + shared)),
        "head": h * int(get("vocab_size")),
    }


def seconds(run: Any, repeats: int = 5) -> float:
    """Return the median seconds of a call after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_flops_per_s(size: int = 1024) -> float:
    """Return the bf16 GEMM rate of this machine at size^3."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, 20)


def floor_seconds(preset: str, sequences: int, tokens: int) -> float:
    """Return the seconds of the step's bare products and attention, forward and backward.

    Each product is three GEMMs (output, input gradient, weight gradient) on preallocated bf16
    operands; experts get equal token counts as one batched product; attention is torch's fused
    kernel on equal head widths. No norm, activation, routing, copy, loss or optimizer.
    """
    get = load_preset(preset).value
    h, layers, heads = (int(get(n)) for n in ("hidden_size", "num_layers", "num_attention_heads"))
    ql, kvl = int(get("q_lora_rank")), int(get("kv_lora_rank"))
    nope, rope, value = (int(get(n)) for n in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
    moe, shared = int(get("moe_ffn_hidden_size")), int(get("moe_shared_expert_intermediate_size"))
    experts, topk = int(get("num_experts")), int(get("moe_router_topk"))
    dense, rows = str(get("moe_layer_freq")).count("[0]"), sequences * tokens
    widths = [(h, ql), (ql, heads * (nope + rope)), (h, kvl + rope), (kvl, heads * (nope + value))]
    products = [(layers, 1, rows, *pair) for pair in [*widths, (heads * value, h)]]
    ffn, sparse = int(get("ffn_hidden_size")), layers - dense
    products += [(dense, 1, rows, h, 2 * ffn), (dense, 1, rows, ffn, h)]
    products += [(sparse, 1, rows, h, 2 * shared), (sparse, 1, rows, shared, h)]
    per_expert = rows * topk // experts
    products += [(sparse, experts, per_expert, h, 2 * moe), (sparse, experts, per_expert, moe, h)]
    products += [(1, 1, rows, h, int(get("vocab_size")))]
    return sum(_product_seconds(*p) for p in products) + layers * _attention_seconds(
        sequences, heads, tokens, nope + rope
    )


def _product_seconds(count: int, batch: int, rows: int, inner: int, outer: int) -> float:
    x = torch.randn(batch, rows, inner, dtype=torch.bfloat16)
    weight = torch.randn(batch, outer, inner, dtype=torch.bfloat16)
    grad = torch.randn(batch, rows, outer, dtype=torch.bfloat16)

    def run() -> None:
        torch.bmm(x, weight.transpose(1, 2))
        torch.bmm(grad, weight)
        torch.bmm(grad.transpose(1, 2), x)

    return count * seconds(run)


def _attention_seconds(sequences: int, heads: int, tokens: int, width: int) -> float:
    shape = (sequences, heads, tokens, width)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=torch.bfloat16)
    attention = torch.nn.functional.scaled_dot_product_attention
    return seconds(lambda: attention(q, k, v, is_causal=True).backward(grad))


def fastest_experts(
    names: tuple[str, ...], options: argparse.Namespace, weights: Path
) -> dict[str, float]:
    """Return the best seconds of each of transformers' experts, each running alone."""
    best = {}
    for name in names:
        player = Contestant(name, options, weights)
        best[name] = min(player.step(index)["seconds"] for index in range(SCREENING_STEPS))
        player.close()
    return best


def contest(
    names: list[str], options: argparse.Namespace, weights: Path
) -> dict[str, dict[str, Any]]:
    """Time all contestants in turn, step by step, so that a drifting machine meets all alike."""
    players = [Contestant(name, options, weights) for name in names]
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in names}
    for index in range(options.warmup + options.steps):
        for player in players:
            answer = player.step(index)
            results[player.name]["losses"].append(answer["loss"])
            results[player.name]["peak_rss_bytes"] = answer["peak_rss_bytes"]
            if index >= options.warmup:
                results[player.name]["seconds"].append(answer["seconds"])
    for player in players:
        if options.profile:
            results[player.name]["kernels"] = player.step(0, "kernels")["kernels"]
        if player.name == "megatron":
            results[player.name]["adaptation"] = player.step(0, "adaptation")["adaptation"]
        player.close()
    for result in results.values():
        result["median_s"] = statistics.median(result["seconds"])
    return results


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each contestant")
    parser.add_argument("--profile", action="store_true", help="print the costliest kernels")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="contestants: k2 megatron hf-<experts>"
    )
    return parser.parse_args()


def main() -> None:
    """Run the contest and print the tables and the JSON line."""
    options = parse_options()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        shared_weights(options.preset, weights)
        rate = gemm_flops_per_s()
        floor = floor_seconds(options.preset, options.sequences, options.tokens)
        names = options.only
        if not names:
            alone = fastest_experts(tuple(f"hf-{e}" for e in HF_EXPERTS), options, weights)
            rows = [(name, f"{spent * 1e3:,.0f}") for name, spent in alone.items()]
            print_table("transformers' experts, each alone", ("contestant", "best ms"), rows)
            names = ["k2", "megatron", min(alone, key=lambda name: alone[name])]
        results = contest(names, options, weights)
    report(options, results, rate, floor)
    if "k2" in results:
        check_losses(results)


def report(
    options: argparse.Namespace, results: dict[str, dict[str, Any]], rate: float, floor: float
) -> None:
    """Print what was measured."""
    tokens = options.sequences * options.tokens
    flops = 6 * tokens * sum(macs_per_token(options.preset, options.tokens).values())
    rows = []
    for name, result in results.items():
        median = result["median_s"]
        rows.append(
            (
                name,
                f"{tokens / median:,.0f}",
                f"{median * 1e3:.0f}",
                f"{flops / median / rate:.1%}",
                f"{floor / median:.1%}",
                f"{result['peak_rss_bytes'] / 2**20:,.0f}",
                f"{loss_of(result):.5f}",
            )
        )
    print_table(
        f"{options.preset}, bf16, {options.sequences} x {options.tokens} tokens, {THREADS} threads",
        ("contestant", "tokens/s", "ms", "of GEMM rate", "of floor", "peak MiB", "loss, step 5"),
        rows,
    )
    print(f"  GEMM 1024^3 {rate / 1e9:,.0f} GFLOP/s; floor {floor * 1e3:.0f} ms; ", end="")
    print(f"model {flops / 1e9:.1f} GFLOP a step")
    for name, result in results.items():
        for kernel, spent in result.get("kernels", {}).items():
            print(f"  {name}: {spent * 1e3:7.1f} ms  {kernel}")
        if "adaptation" in result:
            print(f"  {name}: {result['adaptation']:.2%} of its step in our host layer (profiled)")
    if "k2" in results:
        print_json(**figures(results, tokens, flops, rate, floor))


def loss_of(result: dict[str, Any]) -> float:
    """Return a contestant's loss in step 5, or nan before it."""
    losses = result["losses"]
    return losses[LOSS_STEP - 1] if len(losses) >= LOSS_STEP else float("nan")


def check_losses(results: dict[str, dict[str, Any]]) -> None:
    """End the bench with status 1 if the contestants did not do the same work."""
    ours = loss_of(results["k2"])
    for name, result in results.items():
        allowed = LOSS_TOLERANCE.get(name.partition("-")[0], 0.0)
        if not abs(loss_of(result) - ours) <= allowed:  # nan, of too few steps, fails too
            raise SystemExit(f"{name}: loss {loss_of(result):.5f}, ours {ours:.5f} +- {allowed}")


def figures(
    results: dict[str, dict[str, Any]], tokens: int, flops: float, rate: float, floor: float
) -> dict[str, Any]:
    """Return the named figures of the JSON line; print each with its peer, ratio and bar."""
    seconds_of = {name: result["median_s"] for name, result in results.items()}
    ours = seconds_of["k2"]
    peers = {"vs_megatron_local": "megatron", "vs_hf": "hf-"}
    found: dict[str, Any] = {"tokens_per_s": tokens / ours}
    rows: list[tuple[str, str, str, str]] = []
    for figure, prefix in peers.items():
        names = [name for name in seconds_of if name.startswith(prefix)]
        found[figure] = min(map(seconds_of.__getitem__, names)) / ours if names else None
        if names:
            rows.append((figure, " ".join(names), f"{found[figure]:.2f}"))
    found["mfu_vs_gemm"], found["of_floor"] = flops / ours / rate, floor / ours
    rows.append(("mfu_vs_gemm", "GEMM 1024^3", f"{found['mfu_vs_gemm']:.2f}"))
    rows.append(("of_floor", "bare products, attention", f"{found['of_floor']:.2f}"))
    print_table(
        "speed against each peer",
        ("figure", "peer", "ratio", "bar", ""),
        [
            (*row, BARS[row[0]], "met" if found[row[0]] >= BARS[row[0]] else "not met")
            for row in rows
        ],
    )
    found["peak_rss_bytes"] = results["k2"]["peak_rss_bytes"]
    found["loss_step_5"] = {name: loss_of(result) for name, result in results.items()}
    found["adaptation_overhead"] = results.get("megatron", {}).get("adaptation")
    return found


if __name__ == "__main__":
    main()
