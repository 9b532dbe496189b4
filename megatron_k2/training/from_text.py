"""``make pretrain``: real text in, a trained K2-style model, its loss curve and a sample out.

Stages, each done once and skipped when it is done: corpus (documents, deduplication, split),
tokens (tokenizer, `.bin/.idx`), probe (held-out loss before training, speed of this machine, and
from it the number of steps, kept for all later runs), train (Megatron's loop on 2 processes, EP2
and the distributed optimizer; resumes from its last checkpoint), report. Flags it does not know
go to megatron_k2.training.pretrain unchanged and win over the job's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_k2.data.corpus import build_corpus, write_corpus
from megatron_k2.data.documents import read_input, read_python_library
from megatron_k2.data.tokenize import load_tokenizer, read_texts, train_tokenizer, write_indexed
from megatron_k2.presets import load_preset
from megatron_k2.training import stages
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.job import (
    NUM_EVALUATIONS,
    NUM_PROCESSES,
    PROBE_ITERS,
    TRAIN_MODULE,
    Job,
    Settings,
)
from megatron_k2.training.launch import last_checkpoint, run_module
from megatron_k2.training.results import finish

MAX_INPUT_BYTES = 200_000_000  # read at most: ten times what an hour on two cores can use
HELDOUT_BYTES = 100_000  # about 30,000 tokens: a few seconds a pass
DEFAULT_MINUTES = 3.0
# What the figures, the yardsticks and the resumption of the job rest on.
OWN_FLAGS = (
    *("--seq-length", "--global-batch-size", "--micro-batch-size", "--seed", "--vocab-size"),
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--mock-data"),
    *("--save", "--load", "--tensorboard-dir", "--tokenizer-model", "--tokenizer-type"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the job's own flags; `extra` holds the rest, which is Megatron's.

    Raises:
        ValueError: a number out of range.
    """
    parser = argparse.ArgumentParser(
        prog="pretrain_from_text.py",
        description="Train a small K2-style model on text. Run again, it resumes.",
        epilog="Any other flag goes to megatron_k2.training.pretrain, for example --lr 1e-3.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='JSONL with a "text" field (.jsonl, .ndjson, .json) or plain text, its first 200 MB; '
        "the sources and documentation of Python's standard library when left out",
    )
    parser.add_argument("--output", "--out", type=Path, default=Path("out/pretrain"), metavar="DIR")
    parser.add_argument("--minutes", type=float, help="training time to plan for; default 3")
    parser.add_argument("--train-iters", type=int, help="steps, instead of --minutes")
    parser.add_argument("--k2-preset", default="k2-nano", help="model; default k2-nano")
    parser.add_argument("--prompt", help="text to continue at the end; default: held-out text")
    args, extra = parser.parse_known_args(argv)
    args.extra = extra
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise ValueError(f"--minutes {args.minutes:g} must be a number above 0")
    taken = [flag for flag in extra if flag.partition("=")[0] in OWN_FLAGS]
    if taken:
        raise ValueError(f"{taken[0]} is set by this job; use megatron_k2.training.pretrain for it")
    if args.train_iters is not None and args.train_iters < 1:
        raise ValueError(f"--train-iters {args.train_iters} must be at least 1")
    return args


def say(stage: str, text: str) -> None:
    """Print what a stage did."""
    print(f"[{stage}] {text}", flush=True)


@contextlib.contextmanager
def progress_bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show how much of a text is done, where somebody looks; yields a call that takes it.

    Args:
        what: the work.
        num_bytes: of the text; the call counts characters, nearly the same number.
    """
    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)


def corpus_stage(job: Job, source: Path | None) -> dict[str, Any]:
    """Deduplicate and split the text; return the corpus report."""

    def build(folder: Path) -> dict[str, Any]:
        documents = read_python_library() if source is None else read_input(source, MAX_INPUT_BYTES)
        return write_corpus(build_corpus(documents, HELDOUT_BYTES), folder)

    if source is None:
        text = f"standard library of Python {sys.version.split()[0]}"
    else:
        next(read_input(source, MAX_INPUT_BYTES), None)  # raises what is wrong with the file
        text = stages.fingerprint(source, MAX_INPUT_BYTES)
    report, built = stages.run_stage(job.corpus, {"--input": text}, build)
    duplicates = report["num_exact_duplicates"] + report["num_near_duplicates"]
    say(
        "corpus",
        f"{report['num_train']:,} training documents ({report['train_bytes'] / 1e6:.1f} MB), "
        f"{report['num_heldout']} held out ({report['heldout_bytes'] / 1e3:.0f} kB), "
        f"{duplicates} duplicates dropped" + ("" if built else "; done before"),
    )
    return report


def tokens_stage(job: Job, corpus: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Train the tokenizer and write `.bin/.idx`; return the numbers of tokens and pieces."""

    def build(folder: Path) -> dict[str, Any]:
        model = folder / "tokenizer.model"
        model.write_bytes(train_tokenizer(read_texts(job.corpus / "train.jsonl"), vocab_size))
        tokenizer = load_tokenizer(model)
        threads = min(8, len(os.sched_getaffinity(0)))
        report = {"pieces": int(tokenizer.vocab_size())}
        for split in ("train", "heldout"):
            texts, size = read_texts(job.corpus / f"{split}.jsonl"), corpus[f"{split}_bytes"]
            with progress_bar(f"tokenising {split}", size) as bar:
                report[split] = write_indexed(texts, tokenizer, folder / split, threads, bar)
        return report

    inputs = {"text": marker_hash(job.corpus), "vocabulary": vocab_size}
    report, built = stages.run_stage(job.tokens, inputs, build)
    say(
        "tokens",
        f"{report['train']:,} training and {report['heldout']:,} held-out tokens of "
        f"{report['pieces']:,} pieces" + ("" if built else "; done before"),
    )
    return report


def marker_hash(folder: Path) -> str:
    """Return a hash of a finished stage: of its inputs and its report."""
    return stages.fingerprint(folder / stages.MARKER, 1 << 20)


def plan_stage(job: Job, args: argparse.Namespace, lock: int) -> dict[str, Any]:
    """Probe this machine once and fix the number of steps; a later run may only ask for more.

    Returns:
        train_iters, seconds_per_iteration, evaluation_s and initial_heldout_loss.
    """
    path = job.output / "plan.json"
    plan = stages.read_json(path)
    settings = json.loads(json.dumps(vars(job.settings)))
    if plan is None:
        say("probe", "measuring speed and the held-out loss before training (about 30 s)")
        plan = {**_probe(job, lock), "settings": settings, "tokens": marker_hash(job.tokens)}
        plan["train_iters"] = args.train_iters or planned_steps(
            plan, args.minutes or DEFAULT_MINUTES
        )
    else:
        changed = [key for key in settings if plan["settings"].get(key) != settings[key]]
        if plan["tokens"] != marker_hash(job.tokens):
            changed.append("text or tokenizer")
        if changed:
            raise ValueError(
                f"--output {job.output}: holds a run with other {', '.join(changed)}; "
                "give another --output, or remove the folder to begin again"
            )
        wanted = args.train_iters or (planned_steps(plan, args.minutes) if args.minutes else 0)
        plan["train_iters"] = max(plan["train_iters"], wanted)
    stages.write_json(path, plan)
    tokens = plan["train_iters"] * job.settings.tokens_per_iteration
    say("probe", f"{plan['train_iters']} steps, {tokens:,} tokens planned")
    return plan


def _probe(job: Job, lock: int) -> dict[str, Any]:
    """Run a few steps that change nothing; return their time and the initial held-out loss."""
    log = run_module(
        TRAIN_MODULE, job.probe_arguments(), job.output / "probe.log", NUM_PROCESSES, lock=lock
    )
    if len(log.iterations) != PROBE_ITERS or not log.validations:
        raise RuntimeError(f"the probe printed no losses; see {job.output / 'probe.log'}")
    return {
        "seconds_per_iteration": min(step.seconds for step in log.iterations),
        "evaluation_s": log.last_validation_s - log.last_iteration_s,
        "initial_heldout_loss": log.validations[-1][1],
    }


def planned_steps(plan: dict[str, Any], minutes: float) -> int:
    """Return how many steps fit, with the evaluations and checkpoints between them."""
    left_s = minutes * 60 - NUM_EVALUATIONS * plan["evaluation_s"]
    return max(20, int(max(left_s, minutes * 30) / plan["seconds_per_iteration"]))


def train_stage(job: Job, plan: dict[str, Any], lock: int) -> None:
    """Train from the last checkpoint, if there is one, to the planned step."""
    done = last_checkpoint(job.checkpoints)
    if done >= plan["train_iters"]:
        say("train", f"all {done} steps are done; a larger --minutes or --train-iters continues")
        return
    say("train", f"from step {done}; log in {job.output / 'train.log'}")
    run_module(
        TRAIN_MODULE,
        job.train_arguments(plan["train_iters"], plan["seconds_per_iteration"]),
        job.output / "train.log",
        NUM_PROCESSES,
        job.settings.tokens_per_iteration,
        lock,
    )
    if last_checkpoint(job.checkpoints) < plan["train_iters"]:
        raise RuntimeError(f"training left before its last step; see {job.output / 'train.log'}")


PARSE = """
import argparse, megatron_k2
megatron_k2.register()
from megatron.training.arguments import add_megatron_arguments
add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args()
"""


def check_extra(extra: list[str]) -> None:
    """Let Megatron's parser look at the flags meant for it, before anything else is done.

    In a process of its own, because registering K2 changes the one it happens in.

    Raises:
        ValueError: a flag or a value that Megatron does not know.
    """
    command = [sys.executable, "-W", "ignore", "-c", PARSE, *extra]
    parsed = subprocess.run(command, capture_output=True, text=True, check=False)
    if parsed.returncode:
        raise ValueError(
            parsed.stderr.strip().splitlines()[-1].removeprefix("megatron_k2: error: ")
        )


def run(args: argparse.Namespace) -> None:
    """Run every stage that is not done, and print the summary."""
    if args.extra:
        check_extra(args.extra)
    preset = load_preset(args.k2_preset)
    vocab_size, seq_length = preset.value("vocab_size"), preset.value("seq_length")
    if not isinstance(vocab_size, int) or not isinstance(seq_length, int):
        raise ValueError(f"--k2-preset {preset.name}: names no vocab_size and seq_length")
    settings = Settings(preset=preset.name, seq_length=seq_length, flags=tuple(args.extra))
    job = Job(args.output, settings)
    with stages.locked(job.output) as lock:
        corpus = corpus_stage(job, args.input)
        tokens = tokens_stage(job, corpus, vocab_size)
        job = replace(job, vocab_size=tokens["pieces"])
        plan = plan_stage(job, args, lock)
        train_stage(job, plan, lock)
        finish(job, plan, corpus, tokens, args.prompt)


def main(argv: list[str] | None = None) -> int:
    """Run the job; report a user's error in one line.

    Returns:
        Exit status: 0 done, 1 a run failed, 2 bad input, 130 stopped by a signal.
    """
    start = time.monotonic()
    status = run_tool(lambda: run(parse_args(argv)))
    if status == 0:
        say("done", f"{(time.monotonic() - start) / 60:.1f} minutes")
    return status


if __name__ == "__main__":
    sys.exit(main())
