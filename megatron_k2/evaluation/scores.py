"""What answers are worth: shares of right ones, and validity of tool calls, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_k2.chat.schema import CallScore, ToolSchemas, check_message
from megatron_k2.evaluation.asking import Said
from megatron_k2.evaluation.intervals import bootstrap_mean, wilson
from megatron_k2.evaluation.tasks import Task, groups_of, is_right


def text_of(said: Said) -> str:
    """Return what an answer says, without reasoning."""
    return str(said.message.get("content") or "")


UNGROUPED = "ungrouped"


def exact_score(tasks: Sequence[Task], answers: Sequence[Sequence[Said]]) -> dict[str, Any]:
    """Return the share of right answers, of all tasks and of each group.

    Tasks without a group are ``ungrouped`` beside others. Each has ``accuracy``, ``interval``
    (95 %: Wilson's for one sample a task, the bootstrap over tasks for more), ``tasks``, ``errors``
    (answers that the server refused, left out) and, with several samples, ``any_right``.
    """
    right = [
        [is_right(task, text_of(one)) for one in said if not one.error]
        for task, said in zip(tasks, answers, strict=True)
    ]
    report = {"all": _share(right, answers)}
    groups = groups_of(tasks)
    if len(groups) > 1:
        for group in groups:
            chosen = [at for at, task in enumerate(tasks) if task.group == group]
            report[group or UNGROUPED] = _share(
                [right[at] for at in chosen], [answers[at] for at in chosen]
            )
    return report


def _share(right: Sequence[Sequence[bool]], answers: Sequence[Sequence[Said]]) -> dict[str, Any]:
    counted = [one for one in right if one]
    means = [sum(one) / len(one) for one in counted]
    finish = Counter(one.finish_reason or "error" for said in answers for one in said)
    found: dict[str, Any] = {
        "tasks": len(counted),
        "errors": sum(bool(one.error) for said in answers for one in said),
        "finish_reasons": dict(sorted(finish.items())),
        "mean_tokens": sum(one.tokens for said in answers for one in said)
        / max(1, sum(map(len, answers))),
    }
    if not counted:
        return found | {"accuracy": None, "interval": None}
    single = all(len(one) == 1 for one in counted)
    interval = wilson(sum(means), len(means)) if single else bootstrap_mean(means)
    found |= {"accuracy": sum(means) / len(means), "interval": list(interval)}
    if not single:
        found["any_right"] = sum(any(one) for one in counted) / len(counted)
    return found


def call_score(
    questions: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]], bool | None]],
    answers: Sequence[Said],
) -> dict[str, Any]:
    """Return the validity of tool calls in the manner of Moonshot's vendor verifier.

    Args:
        questions: messages, declarations, and whether a reference answer calls tools (None where
            there is none).
        answers: one each.

    Returns:
        ``schema_accuracy`` (answers with calls whose calls all are declared and fit their schemas)
        and ``valid_calls`` (calls without any problem, form and count of ids too) with 95 %
        intervals, ``trigger_f1``, counts, the problems by kind, and finish reasons.
    """
    score = CallScore()
    finish: Counter[str] = Counter()
    for (messages, tools, reference), said in zip(questions, answers, strict=True):
        if said.error:
            finish["error"] += 1
            continue
        finish[said.finish_reason] += 1
        before = sum(len(one.get("tool_calls") or ()) for one in messages)
        score.add(check_message(said.message, ToolSchemas(tools, strict=False), before), reference)
    return {
        "answers": score.num_answers,
        "errors": finish["error"],
        "calling": score.num_calling,
        "calls": score.num_calls,
        "schema_accuracy": score.schema_accuracy,
        "schema_interval": list(wilson(score.num_fitting, score.num_calling)),
        "valid_calls": score.num_valid_calls / score.num_calls if score.num_calls else None,
        "valid_interval": list(wilson(score.num_valid_calls, score.num_calls)),
        "trigger_f1": score.trigger_f1,
        "problems": dict(sorted(score.kinds.items())),
        "finish_reasons": dict(sorted(finish.items())),
    }
