"""One optimizer step of MuonClip on the CPU against Megatron's Muon and torch's, in one process.

``.venv/bin/python tools/bench/muonclip.py`` times a step over all matrices of a preset (its expert
tensors as this project stores them; the peers get a matrix an expert, as they need) and one over 64
experts of 512 x 256 with four 1024 x 1024 matrices: fp32 weights and momenta, five steps of the
same coefficients in bf16, at least 7 repeats in turn, medians. The error of one update is against
the same polynomials in fp64. Peers: ``TensorParallelMuon`` of Megatron-Core with
emerging-optimizers 0.3 (``pip install 'megatron-k2[muon]'``; left out where it is missing) and
``torch.optim.Muon``. Bars: 3x and 1.6x the better one, 90 % of the GEMM rate by nominal FLOPs.
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

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_k2.optimizer.coefficients import coefficient_schedule  # noqa: E402
from megatron_k2.optimizer.matrices import Rule, assign, kimi_rules  # noqa: E402
from megatron_k2.optimizer.muonclip import MuonClip  # noqa: E402
from megatron_k2.optimizer.newton_schulz import method_flops, newton_schulz  # noqa: E402

BARS = {"nano": 3.0, "experts": 1.6}
GEMM_BAR = 0.9
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.95, 0.1
Named = dict[str, tuple[int, ...]]


def preset_matrices(preset: str) -> tuple[Named, tuple[Rule, ...]]:
    """Return name and shape of a preset's Muon parameters, and their rules."""
    from contestants import parsed_args, start_single_process
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.model.specs import get_k2_layer_specs

    args = parsed_args(preset, 1, 64)
    start_single_process()
    config = core_transformer_config_from_args(args)
    model = GPTModel(
        config,
        get_k2_layer_specs(config),
        vocab_size=args.vocab_size,
        max_sequence_length=64,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    )
    rules = kimi_rules(config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    muon = {n: s for n, s in shapes.items() if assign(n, s, rules).rule.algorithm == "muon"}
    return muon, rules


def expert_matrices() -> tuple[Named, tuple[Rule, ...]]:
    """Return the second set: one tensor of 64 experts and four large squares."""
    squares = {f"square{index}": (1024, 1024) for index in range(4)}
    return {"experts": (64, 512, 256), **squares}, (Rule("*", "muon"),)


def random_parameters(shapes: Named) -> dict[str, Tensor]:
    """Return parameters with gradients, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        parameter = torch.randn(shape, generator=generator).mul_(0.02).requires_grad_()
        parameter.grad = torch.randn(shape, generator=generator)
        parameters[name] = parameter
    return parameters


def one_by_one(parameters: dict[str, Tensor]) -> list[Tensor]:
    """Return a parameter a matrix, as an optimizer of 2-D parameters needs them."""
    matrices = []
    for stored in parameters.values():
        assert stored.grad is not None
        stack, grads = stored.detach(), stored.grad
        for matrix, grad in zip(
            *((x.view(-1, *x.shape[-2:])) for x in (stack, grads)), strict=True
        ):
            parameter = matrix.clone().requires_grad_()
            parameter.grad = grad.clone()
            matrices.append(parameter)
    return matrices


def contestants(shapes: Named, rules: tuple[Rule, ...]) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers over the same weights and gradients, by name."""
    found: dict[str, torch.optim.Optimizer] = {
        "k2": MuonClip.for_model(
            random_parameters(shapes).items(), rules, lr=LR, momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        ),
        "torch.optim.Muon": torch.optim.Muon(
            one_by_one(random_parameters(shapes)), LR, WEIGHT_DECAY, MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        ),
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import emerging_optimizers  # noqa: F401  without it the class below is empty
        from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

        found["TensorParallelMuon"] = TensorParallelMuon(
            one_by_one(random_parameters(shapes)), LR, MOMENTUM, True, WEIGHT_DECAY,
            coefficient_type="simple", extra_scale_factor=0.2,
        )  # fmt: skip
    return found


def seconds_of(optimizers: dict[str, Any], repeats: int) -> dict[str, float]:
    """Return each optimizer's median seconds a step, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(repeats + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def update_errors(size: tuple[int, int] = (512, 256)) -> dict[str, float]:
    """Return the relative error of one update's direction against fp64, ours and torch's."""
    grad = torch.randn(size, generator=torch.Generator().manual_seed(5))
    wanted = newton_schulz(grad[None].double(), coefficient_schedule("kimi"), torch.float64)[0]
    ours, theirs = (torch.zeros(size).requires_grad_() for _ in range(2))
    ours.grad, theirs.grad = grad, grad.clone()
    MuonClip.for_model([("a", ours)], (Rule("a", "muon"),), lr=1.0, weight_decay=0.0).step()
    torch.optim.Muon([theirs], 1.0, 0.0, adjust_lr_fn="match_rms_adamw").step()
    scale = -0.2 * max(size) ** 0.5
    return {
        name: float((moved.detach().double() / scale - wanted).norm() / wanted.norm())
        for name, moved in (("k2", ours), ("torch.optim.Muon", theirs))
    }


def gemm_flops_per_s(size: int = 1024) -> float:
    """Return the bf16 GEMM rate at size^3."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(20))


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def nominal_flops(shapes: Named, rules: tuple[Rule, ...]) -> int:
    """Return the FLOPs of five standard steps over the matrices as the rules cut them."""
    kinds = [kind for name, shape in shapes.items() for kind in assign(name, shape, rules).matrices]
    return sum(n * method_flops("standard", rows, columns, 5) for n, rows, columns in kinds)


def main() -> None:
    """Time both sets and print table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
        sets = {"nano": preset_matrices(options.preset), "experts": expert_matrices()}
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name, (shapes, rules) in sets.items():
        rate = gemm_flops_per_s()
        spent = seconds_of(contestants(shapes, rules), options.repeats)
        best = min(spent[peer] for peer in spent if peer != "k2")
        for peer, value in spent.items():
            if peer != "k2":
                against = f"{peer} {value * 1e3:.0f} ms"
                bar = str(BARS[name]) if value == best else ""
                rows.append(
                    (
                        name,
                        f"{spent['k2'] * 1e3:.0f} ms",
                        against,
                        f"{value / spent['k2']:.2f}",
                        bar,
                    )
                )
        fraction = nominal_flops(shapes, rules) / spent["k2"] / rate
        bar = str(GEMM_BAR) if name == "experts" else ""
        rows.append((name, f"{spent['k2'] * 1e3:.0f} ms", "GEMM 1024^3", f"{fraction:.2f}", bar))
        figures |= {f"vs_best_peer_{name}": best / spent["k2"], f"gemm_fraction_{name}": fraction}
    errors = update_errors()
    ratio = errors["k2"] / errors["torch.optim.Muon"]
    rows.append(
        (
            "error",
            f"{errors['k2']:.4f}",
            f"torch {errors['torch.optim.Muon']:.4f}",
            f"{ratio:.2f}",
            "<= 1.25",
        )
    )
    title = f"one step, {THREADS} threads, fp32 weights, bf16 products (ratio: peer / k2)"
    print_table(title, ("figure", "k2", "peer", "ratio", "bar"), rows)
    print_json(**figures, error_vs_torch=ratio, threads=THREADS)


if __name__ == "__main__":
    main()
