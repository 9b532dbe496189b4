"""What is planned: pretraining, fine-tuning, adapters, reinforcement learning, serving.

A training job is a few more flags on the same command and a batch of another size. Batches and
lengths of fine-tuning are choices of ours, to be replaced by yours: Kimi's report gives none.
"""

from __future__ import annotations

from dataclasses import dataclass

FINE_TUNING = ("--finetune", "--moe-router-bias-update-rate", "0")
"""Weights without optimizer state; the router's bias is kept."""


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        summary: in a few words.
        flags: beside the preset's and the layout's.
        global_batch_size: sequences of a step; None is the preset's.
        serves: an engine generates, alone or beside a trainer.
        trains: a trainer is planned.
        overlap: expert messages may hide under another microbatch's products.
        missing: what a run needs beside the printed flags.
        runner: the module that the printed command starts.
    """

    summary: str
    flags: tuple[str, ...] = ()
    global_batch_size: int | None = None
    serves: bool = False
    trains: bool = True
    overlap: bool = True
    missing: str = (
        "data and tokenizer (--data-args-path, --tokenizer-type), --train-samples or "
        "--train-iters, --lr where the preset has none, --load and --save; torchrun's --node-rank "
        "and --master-addr"
    )
    runner: str = "megatron_k2.training.pretrain"


_TUNE = "megatron_k2.training.sft"
_DIALOGUES = (
    "--train-data-path of megatron-k2 preprocess-sft and --tokenizer-model, --train-iters, --lr "
    "where the preset has none, --load and --save; torchrun's --node-rank and --master-addr"
)

JOBS = {
    "pretrain": Job("all weights, the preset's batch"),
    "sft": Job(
        # The schedule that hides expert messages takes no packed rows (training/pretrain.py).
        "all weights, 256 packed sequences a step", FINE_TUNING, 256, overlap=False,
        missing=_DIALOGUES, runner=_TUNE,
    ),
    "lora": Job(
        "adapters of rank 16 over frozen weights, 256 packed sequences a step",
        (*FINE_TUNING, "--k2-lora-rank", "16", "--transformer-impl", "local"), 256, overlap=False,
        missing=_DIALOGUES, runner=_TUNE,
    ),
    "rl": Job(
        "all weights, 256 answers a step, and an engine", FINE_TUNING, 256, serves=True,
        missing="a runner: these are the flags of the trainer's model and layout",
    ),
    "serve": Job("an engine alone", serves=True, trains=False),
}  # fmt: skip
