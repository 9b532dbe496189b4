"""What `tools/serve.py` does with its flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.engine.server.models import (
    FORMATS,
    SMOLLM2,
    is_megatron_checkpoint,
    model_name,
    open_with_transformers,
)
from megatron_k2.engine.server.recording import Recorder, make_replay_app, read_records
from megatron_k2.engine.server.serving import (
    add_serve_flags,
    check_serve_flags,
    run_app,
    serve_engine,
)

DESCRIPTION = """Serve a model over HTTP in OpenAI's form: /v1/chat/completions with tool calls and
streaming, /v1/completions with text or token ids. Stops on SIGTERM or Ctrl-C."""
EXAMPLES = f"""
examples:
  # a Hugging Face folder, for this machine only
  tools/serve.py --model out/pretrain/hf
  # Megatron's checkpoints, by the local engine
  tools/serve.py --model out/pretrain/checkpoints --tokenizer out/pretrain/hf
  # a small real model from a Python package (poor quality: 135 million weights of 4 bits)
  tools/serve.py --model {SMOLLM2} --port 8001
  # for other machines: a token is needed
  MEGATRON_K2_API_KEY=... tools/serve.py --model DIR --host 0.0.0.0
  # record what a model says, and give it again later without the model
  tools/serve.py --model {SMOLLM2} --record answers.jsonl
  tools/serve.py --model {SMOLLM2} --replay answers.jsonl
  # ask
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "hf", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""

IN_TURN = 4  # requests that transformers decodes one after the other
OpenCheckpoint = Callable[[str, argparse.Namespace], tuple[Engine, ChatFormat]]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        prog="serve.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument_group("model").add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="Hugging Face folder or GGUF file (by transformers), folder of Megatron's checkpoints "
        f"(by the local engine), or {SMOLLM2}",
    )
    add("--tokenizer", default="", metavar="DIR", help="default: the model's")
    add(
        "--chat-format",
        choices=FORMATS,
        default="auto",
        help="auto: kimi-k2 where the tokenizer is Kimi's tiktoken.model, otherwise the "
        "tokenizer's own template",
    )
    add(
        "--max-running",
        type=int,
        metavar="N",
        help="requests under way at once; others wait; default 4 by transformers, which decodes "
        "them in turn, 32 by the local engine",
    )
    add("--record", type=Path, metavar="FILE", help="append the model's answers to a JSONL file")
    add("--replay", type=Path, metavar="FILE", help="give recorded answers; no model is loaded")
    add_serve_flags(found)
    return found


def run(args: argparse.Namespace, open_checkpoint: OpenCheckpoint | None = None) -> None:
    """Serve what the flags name until a signal.

    Args:
        args: of `parser`.
        open_checkpoint: opens a folder of Megatron's checkpoints; None where nothing does.

    Raises:
        ValueError: a flag or a model that cannot be used, or a package that it needs is missing.
    """
    check_serve_flags(args)
    if args.max_running is not None and args.max_running < 1:
        raise ValueError(f"--max-running {args.max_running}: must be 1 or more")
    if args.record and args.replay:
        raise ValueError("--record and --replay exclude each other")
    name = args.served_model_name or model_name(args.model)
    if args.replay:
        run_app(make_replay_app(read_records(args.replay), name, args.api_key), name, args)
        return
    if is_megatron_checkpoint(args.model):
        if open_checkpoint is None:
            raise ValueError(
                f"--model {args.model}: is a Megatron checkpoint; "
                "megatron-k2 convert-checkpoint to-hf makes a folder of it that can be served"
            )
        engine, chat_format = open_checkpoint(args.model, args)
    else:
        engine, chat_format = open_with_transformers(
            args.model, args.tokenizer, args.chat_format, args.max_running or IN_TURN
        )
    serve_engine(engine, chat_format, name, args, _recorder(args.record))


def _recorder(path: Path | None) -> Callable[[ASGIApp], ASGIApp]:
    return (lambda app: app) if path is None else (lambda app: Recorder(app, path))
