"""lm-evaluation-harness against a server: its own tasks, its own numbers with standard errors.

A thin call of ``lm_eval.simple_evaluate`` (extra ``eval``): generation goes to
``/v1/chat/completions``, likelihoods to ``/v1/completions``, which then need a tokenizer. Most of
its tasks fetch their data when first used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from megatron_k2.compat import optional
from megatron_k2.evaluation.asking import Server
from megatron_k2.evaluation.intervals import Z_95


def run_harness(
    server: Server,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    concurrency: int = 16,
    max_tokens: int = 1024,
) -> dict[str, Any]:
    """Return the harness' scores by task.

    Args:
        server: where the model is.
        tasks: names of the harness', or of ``include_path``.
        include_path: folder of further tasks.
        limit: questions a task.
        tokenizer: of Hugging Face; with one the completions of plain text are used.
        concurrency: requests under way.
        max_tokens: of an answer, where the task names none.

    Raises:
        ValueError: the package is missing, or there is no such task.
    """
    try:
        optional("lm_eval").require()
    except ImportError as error:
        raise ValueError(f"harness: {error}") from error
    lm_eval: Any = importlib.import_module("lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: lm-evaluation-harness has no such task")
    path = "completions" if tokenizer else "chat/completions"
    model_args: dict[str, Any] = {
        "model": server.model,
        "base_url": f"{server.url.rstrip('/')}/{path}",
        "num_concurrent": concurrency,
        "max_retries": server.retries,
        "max_gen_toks": max_tokens,
        "tokenized_requests": False,
    }
    if tokenizer:
        model_args |= {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
    os.environ.setdefault("OPENAI_API_KEY", os.environ.get(server.key_env) or "none")
    found = lm_eval.simple_evaluate(
        model="local-completions" if tokenizer else "local-chat-completions",
        model_args=model_args,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=not tokenizer,
    )
    return {task: with_intervals(scores) for task, scores in found["results"].items()}


def with_intervals(scores: dict[str, Any]) -> dict[str, Any]:
    """Return a task's scores, each with the normal 95 % interval of its standard error.

    Args:
        scores: the harness': ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``.
    """
    kept = {name: value for name, value in scores.items() if name not in ("alias", "name")}
    for name, value in scores.items():
        metric, comma, rule = name.partition(",")
        error = scores.get(f"{metric}_stderr{comma}{rule}")
        if comma and isinstance(value, int | float) and isinstance(error, int | float):
            kept[f"{metric}_interval,{rule}"] = [value - Z_95 * error, value + Z_95 * error]
    return kept
