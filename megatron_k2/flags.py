"""The ``--k2-*`` flags: names, values, defaults and help.

Their destinations are fields of ``K2TransformerConfig`` and ``MuonClipConfig``, or are read by
``arguments.py``, which lays presets under them, and ``argument_checks.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_k2 import device
from megatron_k2.fp8.activation_store import ACTIVATIONS
from megatron_k2.fp8.scope import SCOPES
from megatron_k2.presets import list_presets

MUONCLIP = "muonclip"
SPEC = ("megatron_k2.model.specs", "get_k2_decoder_block_spec")
"""What ``--spec`` is under a preset, or under a folder that takes one's place."""


def add_run_flags(group: Any) -> None:
    """Add what says which model runs where and how."""
    group.add_argument(
        "--k2-preset",
        metavar="NAME",
        help=f"Model preset: {', '.join(list_presets())}; or a folder: a Hugging Face model's, or "
        "one that convert_checkpoint.py wrote.",
    )
    group.add_argument(
        "--k2-device",
        choices=device.DEVICES,
        default="auto",
        help="Where to run; auto takes CUDA if torch sees a GPU. cpu uses gloo and local specs.",
    )
    group.add_argument(
        "--k2-threads",
        type=int,
        default=0,
        help="Threads a process on the CPU; 0 divides the cores over the local processes.",
    )
    group.add_argument(
        "--k2-precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="Number format of weights and activations; auto takes bf16 where the machine has a "
        "bf16 unit, else fp32. Megatron's --bf16 and --fp16 win.",
    )
    group.add_argument(
        "--k2-verify-checkpoint",
        choices=("full", "size", "off"),
        default="full",
        help="Check a checkpoint before loading: sizes and checksums, sizes only, or nothing.",
    )

    group.add_argument(
        "--k2-offload-folder",
        metavar="DIR",
        help="Where --fine-grained-activation-offloading keeps activations on the CPU, in files "
        "without a name; the system's temporary folder by default.",
    )
    group.add_argument(
        "--k2-load-hf",
        metavar="DIR",
        help="Start from a Hugging Face folder of the DeepSeek-V3 family, BF16, block FP8 or INT4; "
        "its config.json gives the model's arguments. A checkpoint in --load wins.",
    )


def add_model_flags(group: Any) -> None:
    """Add K2's own choices in the model; destinations are fields of ``K2TransformerConfig``."""
    group.add_argument(
        "--k2-router-bias-rule",
        choices=("sign", "mean_centred"),
        default="sign",
        help="Update of the router's expert bias: sign(e_i), or Moonlight's sign(e_i) - mean sign.",
    )
    group.add_argument(
        "--k2-context-exchange",
        choices=("latent", "expanded"),
        default="latent",
        help="What the ranks of --context-parallel-size exchange: the compressed latent and the "
        "shared rotary key, gathered once a layer, or keys and values of every head, as "
        "Transformer Engine does it by --cp-comm-type.",
    )
    group.add_argument(
        "--k2-fp8-activations",
        nargs="*",
        choices=ACTIVATIONS,
        help="Keep these for the backward pass in FP8, a scale for 128 numbers; K2 keeps both. No "
        "name: none, whatever the preset says.",
    )
    group.add_argument(
        "--no-recompute",
        action="store_const",
        const=None,
        dest="recompute_granularity",
        default=argparse.SUPPRESS,
        help="Recompute nothing: takes back what a preset sets.",
    )
    group.add_argument(
        "--no-fine-grained-activation-offloading",
        action="store_false",
        dest="fine_grained_activation_offloading",
        default=argparse.SUPPRESS,
        help="Offload nothing: takes back what a preset sets.",
    )
    group.add_argument(
        "--k2-fp8-scope",
        choices=SCOPES,
        default="experts",
        help="What --fp8-format computes in FP8: routed and shared experts, every projection of "
        "the layers, or attention's own products as well. Without a GPU: --fp8-format e4m3 "
        "--fp8-recipe blockwise, emulated.",
    )
    group.add_argument(
        "--k2-max-attention-logit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Record the exact maximum softmax input of every head (MuonClip needs it).",
    )


def extend_recompute_help(parser: argparse.ArgumentParser) -> None:
    """Name K2's own module in the help of Megatron's ``--recompute-modules``."""
    action = parser._option_string_actions["--recompute-modules"]
    action.help = f"{action.help or ''} moe_down_proj: as moe_act, see megatron_k2/fp8/README.md."


def add_yarn_flags(group: Any) -> None:
    """Add the YaRN fields of MLA that have no flag upstream; defaults are upstream's."""
    group.add_argument(
        "--k2-yarn-beta-fast",
        dest="beta_fast",
        type=float,
        default=32.0,
        help="YaRN beta_fast of MLA (upstream's --yarn-beta-fast does not reach MLA). K2: 1.",
    )
    group.add_argument(
        "--k2-yarn-beta-slow",
        dest="beta_slow",
        type=float,
        default=1.0,
        help="YaRN beta_slow of MLA. K2: 1.",
    )
    group.add_argument(
        "--k2-yarn-original-max-position-embeddings",
        dest="original_max_position_embeddings",
        type=int,
        default=4096,
        help="Positions the model was trained on before YaRN stretches them. K2: 4096.",
    )


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``muonclip`` to the optimizers, and its flags; fields of ``MuonClipConfig``."""
    action = parser._option_string_actions["--optimizer"]
    action.choices = [*(action.choices or ()), MUONCLIP]
    group = parser.add_argument_group(
        title="k2-muonclip",
        description="--optimizer muonclip: Muon with QK-Clip over ZeRO-1 shards. Also read: "
        "--muon-momentum, --muon-coefficient-type (kimi, polar_express, quintic, deepseek_v4), "
        "--muon-num-ns-steps, --muon-extra-scale-factor, --muon-scale-mode, --adam-*, "
        "--qk-clip-threshold, --qk-clip-alpha.",
    )
    group.add_argument(
        "--k2-qk-clip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Shrink the query and key rows of heads whose logits exceed --qk-clip-threshold.",
    )
    group.add_argument(
        "--k2-muon-split",
        choices=("whole", "part", "head"),
        default="whole",
        help="One matrix of the MLA up-projections: the stored one (the reports), each part, or "
        "each head's part.",
    )
    group.add_argument(
        "--k2-muon-rule",
        default="muon",
        metavar="[MODULE:]NAME",
        help="Update rule; one of your own by its module (megatron_k2/optimizer/rules.py).",
    )
    _add_muon_formats(group)


def _add_muon_formats(group: Any) -> None:
    """Add MuonClip's number formats, kernels, memory and what it logs."""
    group.add_argument(
        "--k2-muon-dtype",
        choices=("bf16", "fp16", "fp32"),
        help="Number format of Newton-Schulz products; default: what --muon-fp32-matmul-prec says, "
        "without that bf16, or fp32 on a CPU without a bf16 unit.",
    )
    group.add_argument(
        "--k2-muon-backend",
        choices=("torch", "triton"),
        default="torch",
        help="Kernels of symmetric products; triton needs a GPU and was never run on one.",
    )
    group.add_argument(
        "--k2-muon-wire",
        choices=("fp32", "bf16"),
        default="fp32",
        help="Number format of matrix pieces sent to the rank that orthogonalises them.",
    )
    group.add_argument(
        "--k2-muon-momentum",
        choices=("fp32", "bf16"),
        default="fp32",
        help="Number format of the momentum between steps.",
    )
    group.add_argument(
        "--k2-muon-workspace-bytes",
        type=int,
        default=4 << 30,
        metavar="BYTES",
        help="Cap of what a step allocates beside weights, gradients and state; a single matrix "
        "with its products can exceed it.",
    )
    group.add_argument(
        "--k2-optimizer-offload",
        choices=("none", "moments", "all"),
        default="none",
        help="Keep optimizer state in host memory between steps: nothing, momenta and moments, or "
        "the fp32 weights as well. Bits do not change.",
    )
    group.add_argument(
        "--k2-log-optimizer-interval",
        type=int,
        metavar="STEPS",
        help="Measure update sizes, orthogonality and clipped heads every so many steps; 0 never. "
        "Default: --log-interval.",
    )
