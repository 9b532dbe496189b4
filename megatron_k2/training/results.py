"""The last stage of the main job: yardsticks, picture, sample and summary of a finished run."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_k2.data.ngram import bits_per_byte, fit_bigram, fit_unigram
from megatron_k2.data.tokenize import load_tokenizer, read_texts
from megatron_k2.data.windows import read_windows
from megatron_k2.training import report, stages
from megatron_k2.training.export import export
from megatron_k2.training.job import OUTPUT_MARK, SAMPLE_MODULE, Job
from megatron_k2.training.launch import older_checkpoints, run_module

PROMPT_CHARS = 200  # of a held-out document, when the user gives no prompt


def finish(
    job: Job,
    plan: dict[str, Any],
    corpus: dict[str, Any],
    tokens: dict[str, Any],
    prompt: str | None,
) -> None:
    """Compute what is missing of the results, and print them.

    Args:
        job: a run whose training is done.
        plan: the plan stage's figures.
        corpus: the corpus stage's report.
        tokens: the tokens stage's report.
        prompt: text to continue; the beginning of a held-out document when None.
    """
    for old in list(older_checkpoints(job.checkpoints)):
        shutil.rmtree(old)
    with ThreadPoolExecutor(1) as pool:  # the sampler is a process of its own, on another core
        summary = pool.submit(_stored_summary, job, plan, corpus, tokens)
        sample = _stored_sample(job, plan, prompt)
    show_sample(sample["prompt"], sample["continuation"])
    exported = export(job, plan["train_iters"])
    print(
        f"[export] {job.exported} for transformers; its hidden states and logits are Megatron's to "
        f"{exported['largest_difference']:.0e} of their spread",
        flush=True,
    )
    print(f"[summary] {report.Summary(**summary.result()).line(job.output)}", flush=True)


def _stored_summary(
    job: Job, plan: dict[str, Any], corpus: dict[str, Any], tokens: dict[str, Any]
) -> dict[str, Any]:
    summary = stages.read_json(job.output / "summary.json")
    if summary is None or summary["train_iters"] != plan["train_iters"]:
        summary = summarise(job, plan, corpus, tokens).as_dict()
        stages.write_json(job.output / "summary.json", summary)
    return summary


def _stored_sample(job: Job, plan: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    wanted = {
        "prompt": _heldout_prompt(job.corpus) if prompt is None else prompt,
        "train_iters": plan["train_iters"],
    }
    sample = stages.read_json(job.output / "sample.json")
    if sample is None or {key: sample[key] for key in wanted} != wanted:
        sample = {**wanted, "continuation": sample_text(job, wanted["prompt"])}
        stages.write_json(job.output / "sample.json", sample)
    return sample


def summarise(
    job: Job, plan: dict[str, Any], corpus: dict[str, Any], tokens: dict[str, Any]
) -> report.Summary:
    """Fit the n-grams on the tokens seen, draw loss.png and return the figures."""
    settings, model = job.settings, job.tokens / "tokenizer.model"
    vocab_size = load_tokenizer(model).get_piece_size()
    seen = plan["train_iters"] * settings.global_batch_size
    train = read_windows(
        job.tokens / "train", model, settings.seq_length, settings.seed, job.cache, seen
    )
    heldout = read_windows(
        job.tokens / "heldout", model, settings.seq_length, settings.seed, job.cache, None
    )
    unigram_loss = fit_unigram(train[:, 1:], vocab_size).loss_nats(heldout[:, 1:])
    bigram_loss = fit_bigram(train, vocab_size).loss_nats(heldout)
    train_curve = report.read_scalars(job.tensorboard, report.TRAIN_TAG)
    heldout_curve = {0: plan["initial_heldout_loss"]}
    heldout_curve |= report.read_scalars(job.tensorboard, report.HELDOUT_TAG)
    step_s = list(report.read_scalars(job.tensorboard, "iteration-time").values())
    last = max(heldout_curve)
    if last != plan["train_iters"]:
        raise RuntimeError(
            f"no held-out loss of step {plan['train_iters']} (the last is of step {last}): the run "
            f"was stopped before it; train on with --train-iters {plan['train_iters'] + 1}"
        )
    final_loss = heldout_curve[last]
    report.plot_losses(
        job.output / "loss.png",
        train_curve,
        heldout_curve,
        unigram_loss,
        bigram_loss,
        f"{settings.preset}, {seen * settings.seq_length:,} tokens",
    )
    return report.Summary(
        train_iters=plan["train_iters"],
        train_tokens=seen * settings.seq_length,
        initial_heldout_loss=plan["initial_heldout_loss"],
        final_heldout_loss=final_loss,
        unigram_loss=unigram_loss,
        bigram_loss=bigram_loss,
        bits_per_byte=bits_per_byte(final_loss, tokens["heldout"], corpus["heldout_bytes"]),
        tokens_per_s=settings.tokens_per_iteration / statistics.median(step_s),
    )


def sample_text(job: Job, prompt: str) -> str:
    """Return the trained model's continuation of a prompt.

    Raises:
        RuntimeError: the sampler failed or printed nothing.
    """
    log = job.output / "sample.log"
    log.unlink(missing_ok=True)
    run_module(SAMPLE_MODULE, job.sample_arguments(prompt), log, num_processes=1)
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(OUTPUT_MARK):
            return json.loads(line.removeprefix(OUTPUT_MARK))["continuation"]
    raise RuntimeError(f"{SAMPLE_MODULE} printed no sample; see {log}")


def show_sample(prompt: str, continuation: str) -> None:
    """Print a prompt and, in bold on a terminal, its continuation."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else (">>>", "<<<")
    text = f"{prompt}{bold}{continuation}{plain}"
    print("[sample] " + text.replace("\n", "\n  "), flush=True)


def _heldout_prompt(corpus: Path) -> str:
    """Return the beginning of the first held-out document that is long enough."""
    texts = read_texts(corpus / "heldout.jsonl")
    text = next((text for text in texts if len(text) > 4 * PROMPT_CHARS), "\n")
    lines, line_feed, _ = text[:PROMPT_CHARS].rpartition("\n")
    return lines + line_feed or text[:PROMPT_CHARS]
