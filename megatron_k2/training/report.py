"""What a finished run shows: its loss curves as a picture, and one line of figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_k2.training.events import read_events
from megatron_k2.training.job import HELDOUT_NAME

TRAIN_TAG = "lm loss"
HELDOUT_TAG = f"lm loss validation-{HELDOUT_NAME}"


@dataclass(frozen=True)
class Summary:
    """The figures of a run; losses in nats a token of the held-out text."""

    train_iters: int
    train_tokens: int
    initial_heldout_loss: float
    final_heldout_loss: float
    unigram_loss: float
    bigram_loss: float
    bits_per_byte: float
    tokens_per_s: float

    def line(self, output: Path) -> str:
        """Return the summary in one line that names where the files are."""
        gain = self.unigram_loss - self.final_heldout_loss
        return (
            f"held-out loss {self.initial_heldout_loss:.3f} -> {self.final_heldout_loss:.3f} "
            f"nats/token, {gain:.2f} below a unigram ({self.unigram_loss:.3f}; "
            f"bigram {self.bigram_loss:.3f}), {self.bits_per_byte:.3f} bits/byte, "
            f"{self.train_tokens:,} tokens at {self.tokens_per_s:,.0f}/s; "
            f"loss.png, checkpoints/ and tensorboard/ in {output}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def read_scalars(folder: Path, tag: str) -> dict[int, float]:
    """Return a TensorBoard scalar by step; a step written twice keeps the later value.

    Args:
        folder: holds the event files of one run, resumed any number of times.
        tag: for example "lm loss".
    """
    return read_events(folder).scalars.get(tag, {})


def plot_losses(
    path: Path,
    train: dict[int, float],
    heldout: dict[int, float],
    unigram_loss: float,
    bigram_loss: float,
    title: str,
) -> None:
    """Draw training and held-out loss against steps with the n-gram yardsticks; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    steps = sorted(train)
    axes.plot(steps, [train[step] for step in steps], color="tab:blue", lw=0.8, label="training")
    steps = sorted(heldout)
    label = f"held-out (ends at {heldout[steps[-1]]:.2f})" if steps else "held-out"
    axes.plot(steps, [heldout[step] for step in steps], "o-", color="tab:orange", label=label)
    axes.axhline(unigram_loss, ls="--", color="tab:red", label=f"unigram {unigram_loss:.2f}")
    axes.axhline(bigram_loss, ls=":", color="tab:green", label=f"bigram {bigram_loss:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    pyplot.close(figure)
    partial.replace(path)
