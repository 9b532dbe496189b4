"""``tools/evaluate.py``: flags and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_k2.chat.messages import read_dialogue
from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.evaluation.asking import Asking, Question, Said, Server, ask_all
from megatron_k2.evaluation.harness import run_harness
from megatron_k2.evaluation.scores import call_score, exact_score
from megatron_k2.evaluation.tasks import RULES, is_right, read_tasks
from megatron_k2.inputs import positive_int

EPILOG = """\
examples (a server: tools/serve.py, vLLM, SGLang or a hosted one):
  # questions with known answers: {"prompt": "6 x 7?", "answer": 42, "match": "number"} a line
  evaluate.py exact --tasks tasks.jsonl --server http://127.0.0.1:8000/v1 --model k2 --output out/e
  # are the tool calls valid: {"messages": [...], "tools": [...]} a line
  evaluate.py tools --dialogues heldout.jsonl --server http://127.0.0.1:8000/v1 --model k2 \\
      --output out/t
  # lm-evaluation-harness (pip install 'megatron-k2[eval]')
  evaluate.py harness --tasks gsm8k --server http://127.0.0.1:8000/v1 --model k2 --output out/h

--output gets results.json (scores with 95 % intervals, flags) and answers.jsonl. Killed at any
moment, the same command goes on.
"""
ANSWERS, RESULTS, JOURNAL = "answers.jsonl", "results.json", "journal.jsonl"


def evaluate(argv: Sequence[str] | None = None) -> list[str] | None:
    """Do what the command line says.

    Raises:
        ValueError: bad input; the message names the flag.
        RuntimeError: the server answers nobody.
    """
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    args.output.mkdir(parents=True, exist_ok=True)
    run: Any = args.run
    results, lines = run(args)
    flags = {key: str(value) for key, value in vars(args).items() if key != "run"}
    publish_text(
        args.output / RESULTS, json.dumps({"results": results, "flags": flags}, indent=1) + "\n"
    )
    print("\n".join([*lines, f"[evaluate] {args.output / RESULTS}"]))
    return None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "evaluate.py",
        description="Evaluates a served model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(required=True, metavar="exact | tools | harness")
    exact = commands.add_parser("exact", help="questions with known answers")
    exact.add_argument("--tasks", type=Path, required=True, help="JSONL, see --help of the tool")
    exact.add_argument(
        "--match", choices=tuple(RULES), default="exact", help="of lines without one"
    )
    exact.add_argument("--samples", type=positive_int, default=1, help="answers a question (1)")
    exact.set_defaults(run=_exact)
    tools = commands.add_parser("tools", help="validity of tool calls")
    tools.add_argument(
        "--dialogues", type=Path, required=True,
        help="JSONL; a dialogue that ends in an answer is asked for it, which is the reference",
    )  # fmt: skip
    tools.set_defaults(run=_tools, samples=1)
    harness = commands.add_parser("harness", help="lm-evaluation-harness")
    harness.add_argument("--tasks", required=True, help="its tasks, with commas")
    harness.add_argument("--include-path", help="folder of own tasks")
    harness.add_argument("--limit", type=positive_int, help="questions a task")
    harness.add_argument("--tokenizer", help="a Hugging Face tokenizer, for tasks of likelihoods")
    harness.set_defaults(run=_harness)
    for one in (exact, tools, harness):
        one.add_argument("--server", required=True, help="such as http://127.0.0.1:8000/v1")
        one.add_argument("--model", required=True, help="the name that the server knows")
        one.add_argument("--output", type=Path, required=True, help="a folder")
        one.add_argument(
            "--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key"
        )
        one.add_argument("--concurrency", type=positive_int, default=16, help="requests (16)")
        one.add_argument(
            "--max-tokens", type=positive_int, default=1024, help="of an answer (1024)"
        )
    for one in (exact, tools):
        one.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
        one.add_argument("--top-p", type=float, default=1.0)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def _ask(args: argparse.Namespace, questions: Sequence[Question]) -> list[list[Said]]:
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0 or more, --top-p above 0 and at most 1")
    server = Server(args.server, args.model, args.api_key_env)
    asking = Asking(
        args.samples, args.temperature, args.top_p, args.max_tokens, args.seed, args.concurrency
    )
    return ask_all(questions, server, asking, args.output / JOURNAL, args.quiet)


def _exact(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    tasks = read_tasks(args.tasks, args.match)
    answers = _ask(args, [Question(one.id, one.messages, one.tools) for one in tasks])
    rows = [
        {"id": task.id, "answers": task.answers, **asdict(one)}
        | {"right": None if one.error else is_right(task, str(one.message.get("content") or ""))}
        for task, said in zip(tasks, answers, strict=True)
        for one in said
    ]
    _write(args.output, rows)
    scores = exact_score(tasks, answers)
    lines = []
    for group, found in scores.items():
        if found["accuracy"] is None:
            lines.append(f"[{group}] no answer; {found['errors']} errors")
            continue
        low, high = found["interval"]
        lines.append(
            f"[{group}] {found['accuracy']:.3f} right (95 %: {low:.3f} to {high:.3f}) of "
            f"{found['tasks']} tasks, {found['errors']} errors, {found['mean_tokens']:.0f} tokens "
            f"an answer, ended by {found['finish_reasons']}"
        )
    return scores, lines


def _tools(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    questions, wanted = [], []
    for number, line in enumerate(_lines(args.dialogues), 1):
        try:
            dialogue = read_dialogue(json.loads(line))
        except ValueError as error:
            raise ValueError(f"--dialogues {args.dialogues}, line {number}: {error}") from error
        messages, reference = dialogue.messages, None
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            reference = bool(last.get("tool_calls"))
        questions.append(Question(str(number), messages, dialogue.tools))
        wanted.append((messages, dialogue.tools, reference))
    answers = [said for (said,) in _ask(args, questions)]
    _write(args.output, [{"line": at, **asdict(one)} for at, one in enumerate(answers, 1)])
    score = call_score(wanted, answers)
    low, high = score["schema_interval"]
    share = score["schema_accuracy"]
    shown = "none" if share is None else f"{share:.3f} (95 %: {low:.3f} to {high:.3f})"
    lines = [
        f"[tools] {score['calling']} of {score['answers']} answers call tools; schema accuracy "
        f"{shown}; {score['calls']} calls, valid {score['valid_calls']}; trigger F1 "
        f"{score['trigger_f1']}; problems {score['problems']}; errors {score['errors']}"
    ]
    return score, lines


def _harness(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    found = run_harness(
        Server(args.server, args.model, args.api_key_env),
        args.tasks.split(","),
        include_path=args.include_path,
        limit=args.limit,
        tokenizer=args.tokenizer,
        concurrency=args.concurrency,
        max_tokens=args.max_tokens,
    )
    lines = [
        f"[{task}] " + ", ".join(f"{name} {value}" for name, value in scores.items())
        for task, scores in found.items()
    ]
    return found, lines


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise ValueError(f"--dialogues {path}: {error.strerror}") from error
    if not found:
        raise ValueError(f"--dialogues {path}: no dialogue in it")
    return found


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    publish_text(folder / ANSWERS, "\n".join(lines) + "\n")
