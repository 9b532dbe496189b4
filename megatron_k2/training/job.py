"""The main job's layout on disk and the Megatron command line of its runs.

Two processes, EP2 over both, the distributed optimizer, bf16 (--k2-precision auto: fp32 where the
machine has no bf16 unit). The schedule is warm-up, then linear decay to zero at the planned last
step (Bergsma et al. 2025, Straight to zero). Everything a run depends on is in the settings, so a
resumed run is the same run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_k2.checkpoint.intact import TRACKER

NUM_PROCESSES = 2
TRAIN_MODULE = "megatron_k2.training.pretrain"
SAMPLE_MODULE = "megatron_k2.training.sample"
OUTPUT_MARK = "k2-sample: "  # begins the line that holds the continuation, as JSON
HELDOUT_NAME = "heldout"  # of the validation set, in the log and in TensorBoard
PROBE_ITERS = 8  # the fastest counts: other work on the machine only slows steps down
CHECKPOINT_EVERY_S = 60  # of training; saving k2-nano takes about 2 s
PROGRESS_EVERY_S = 5
NUM_EVALUATIONS = 4  # over the run, the final one included


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run besides the text and the number of steps."""

    preset: str = "k2-nano"
    seq_length: int = 512
    micro_batch_size: int = 2
    global_batch_size: int = 4
    lr: float = 6e-3
    warmup_iters: int = 10
    seed: int = 1234
    flags: tuple[str, ...] = ()  # the user's own Megatron flags

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of one global batch."""
        return self.seq_length * self.global_batch_size


def log_interval(train_iters: int, seconds_per_iteration: float) -> int:
    """Return the steps between progress lines: one every few seconds, ten a run at least."""
    wanted = round(PROGRESS_EVERY_S / seconds_per_iteration)
    return max(1, min(wanted, train_iters // 10))


def eval_interval(train_iters: int) -> int:
    """Return the steps between evaluations, never a divisor of `train_iters`.

    Megatron evaluates once more after the last step, so a divisor would do it twice there.
    """
    interval = -(-train_iters // NUM_EVALUATIONS)
    while interval <= train_iters and train_iters % interval == 0:
        interval += 1
    return interval


@dataclass(frozen=True)
class Job:
    """Folders of a run and its command lines."""

    output: Path
    settings: Settings = field(default_factory=Settings)
    vocab_size: int | None = None  # of the tokenizer, known once it is trained; None: the preset's

    @property
    def corpus(self) -> Path:
        """Folder of train.jsonl and heldout.jsonl."""
        return self.output / "corpus"

    @property
    def tokens(self) -> Path:
        """Folder of tokenizer.model and the `.bin/.idx` pairs."""
        return self.output / "tokens"

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.output / "checkpoints"

    @property
    def exported(self) -> Path:
        """Folder of the trained model in Hugging Face's form."""
        return self.output / "hf"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.output / "tensorboard"

    @property
    def cache(self) -> Path:
        """Folder of Megatron's sample indices."""
        return self.output / "cache"

    def _model_arguments(self) -> list[str]:
        settings = self.settings
        return [
            *("--k2-preset", settings.preset),
            *("--seq-length", str(settings.seq_length)),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokens / "tokenizer.model")),
            *("--seed", str(settings.seed)),
            *(("--vocab-size", str(self.vocab_size)) if self.vocab_size else ()),
        ]

    def _run_arguments(self, train_iters: int, lr: float) -> list[str]:
        settings = self.settings
        return [
            *self._model_arguments(),
            *("--expert-model-parallel-size", str(NUM_PROCESSES)),
            *("--optimizer", "muonclip", "--use-distributed-optimizer"),
            *("--micro-batch-size", str(settings.micro_batch_size)),
            *("--global-batch-size", str(settings.global_batch_size)),
            *("--train-data-path", str(self.tokens / "train")),
            *("--valid-data-path", str(self.tokens / "heldout")),
            *("--data-cache-path", str(self.cache)),
            # One pass over the held-out text each time. Upstream's full validation needs a list
            # of sets (with one set it indexes an int), and reads one sample a rank at a time.
            *("--full-validation", "--multiple-validation-sets"),
            *("--validation-set-names", HELDOUT_NAME, "--eval-micro-batch-size", "1"),
            *("--eval-global-batch-size", str(NUM_PROCESSES)),
            *("--train-iters", str(train_iters)),
            *("--lr", repr(lr), "--min-lr", "0", "--lr-decay-style", "linear"),
            *("--lr-warmup-iters", str(min(settings.warmup_iters, train_iters // 4))),
        ]

    def probe_arguments(self) -> list[str]:
        """Return the command line of the probe: a few steps that change no weight.

        With a learning rate of 0 and frozen router biases the validation at its end is that of
        the initial weights, which the seed fixes, and the steps cost what training steps cost.
        """
        return [
            *self._run_arguments(PROBE_ITERS, lr=0.0),
            *self.settings.flags,
            *("--lr", "0", "--moe-router-bias-update-rate", "0"),
            *("--log-interval", "1", "--eval-interval", str(PROBE_ITERS + 1)),
        ]

    def train_arguments(self, train_iters: int, seconds_per_iteration: float) -> list[str]:
        """Return the command line that trains to `train_iters`, from the last checkpoint if any."""
        arguments = [
            *self._run_arguments(train_iters, self.settings.lr),
            *("--save", str(self.checkpoints)),
            *("--save-interval", str(max(1, round(CHECKPOINT_EVERY_S / seconds_per_iteration)))),
            *("--tensorboard-dir", str(self.tensorboard), "--tensorboard-log-interval", "1"),
            "--log-timers-to-tensorboard",
            *("--log-interval", str(log_interval(train_iters, seconds_per_iteration))),
            *("--eval-interval", str(eval_interval(train_iters))),
            "--exit-signal-handler",
        ]
        if (self.checkpoints / TRACKER).exists():
            # The schedule is this command line's: a longer run decays later.
            arguments += ["--load", str(self.checkpoints), "--override-opt-param-scheduler"]
        return [*arguments, *self.settings.flags]

    def sample_arguments(self, prompt: str) -> list[str]:
        """Return the command line that samples from the last checkpoint in one process."""
        return [
            *self._model_arguments(),
            *("--micro-batch-size", "1", "--no-load-optim", "--no-load-rng"),
            *("--load", str(self.checkpoints), "--k2-prompt", prompt),
            *self.settings.flags,
        ]
