"""``tools/generate.py``: a prompt or a chat in the terminal, from a trained Megatron model.

What the model is comes from its folder (open_model.py), the tokens from the local engine
(megatron_k2/engine), one request at a time and streamed. ``open_checkpoint`` gives a server the
same engine. Flags that it does not know go to Megatron's parser.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.chat.format import ChatFormat, Event, TextDelta
from megatron_k2.chat.plain_text import PlainParser
from megatron_k2.engine.base import Engine, Piece, Request, Sampling
from megatron_k2.inputs import UsageError
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.open_model import OpenedModel, open_model

DESCRIPTION = """Continue a prompt, or chat, with a trained model. The folder says what the model
and its tokenizer are; flags that are not listed go to Megatron's parser and win."""
EXAMPLES = """
examples:
  # continue a text with the model that `make pretrain` trained
  tools/generate.py --load out/pretrain/checkpoints --prompt 'def main():'
  # the same answer every time, the most probable tokens
  tools/generate.py --load out/pretrain/checkpoints --prompt 'import' --temperature 0
  # prompts from standard input, a line each
  printf 'one\\ntwo\\n' | tools/generate.py --load DIR
  # a Hugging Face folder
  tools/generate.py --k2-load-hf out/pretrain/hf --prompt 'class Parser'
  # a dialogue in the terminal; needs a tokenizer with a chat format. /reset forgets, /quit ends
  tools/generate.py --load DIR --chat --system 'You are brief.'
"""
THREADS = 1
"""Of the engine on the CPU: on a machine that others use too, two threads wait for each other. Two
were not measured on a quiet machine."""
SERVED = 32
"""Requests that a server has under way at once; tools/bench/generate.py measures this batch."""
CACHE_BYTES = 256 << 20
"""Of the latents at most, by default: 110,000 tokens of k2-nano in fp32."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        prog="generate.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument_group("model").add_argument
    add("--load", metavar="DIR", help="Megatron checkpoint, the --save folder of a run")
    add("--k2-load-hf", metavar="DIR", help="Hugging Face folder, instead")
    add("--max-context", type=int, metavar="N", help="tokens; default: the run's --seq-length")
    add("--threads", type=int, default=THREADS, metavar="N", help=f"default {THREADS}")
    add = found.add_argument_group("text").add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be given again; default: stdin")
    add("--chat", action="store_true", help="a dialogue in the terminal")
    add("--system", default="", metavar="TEXT", help="first message of the dialogue")
    add(
        "--chat-format",
        choices=("auto", "hugging-face", "kimi-k2", "kimi-k2-thinking"),
        default="auto",
        help="default: Kimi's for Kimi's tokenizer, otherwise the tokenizer's own",
    )
    add = found.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="of an answer; default 256")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy; default 0.8")
    add("--top-p", type=float, default=0.95, metavar="X", help="nucleus; default 0.95")
    add("--top-k", type=int, default=0, metavar="N", help="0 keeps all; the default")
    add("--seed", type=int, metavar="N", help="makes the answer repeatable")
    return found


def make_engine(
    opened: OpenedModel, max_context: int | None, threads: int | None, max_running: int = 8
) -> Engine:
    """Return the local engine of a model.

    Args:
        opened: the model.
        max_context: tokens of a sequence; None: the run's ``--seq-length``.
        threads: torch threads of the engine; None keeps torch's.
        max_running: requests decoded at once.

    Raises:
        ValueError: a limit or a layout that the engine cannot do.
    """
    from megatron_k2.engine.core import LocalCore
    from megatron_k2.engine.local import LocalEngine
    from megatron_k2.engine.scheduler import Limits

    args = opened.args
    context = max_context or args.seq_length
    if context > args.max_position_embeddings:
        raise ValueError(
            f"--max-context {context}: the model has --max-position-embeddings "
            f"{args.max_position_embeddings}"
        )
    width = (args.kv_lora_rank or 0) + (args.qk_pos_emb_head_dim or 0)
    token_bytes = max(1, 4 * args.num_layers * width)
    tokens = max(context, min(context * max_running, CACHE_BYTES // token_bytes))
    step_tokens = max(512, max_running + 1)
    limits = Limits(context, tokens, max_running, step_tokens, keeps_pages=True)
    core = LocalCore(opened.model, limits, vocab_size=opened.tokenizer.vocab_size)
    return LocalEngine(core, threads)


def open_checkpoint(folder: str, args: argparse.Namespace) -> tuple[Engine, ChatFormat]:
    """Open a folder of Megatron's checkpoints for a server.

    Args:
        folder: of the checkpoints.
        args: of ``tools/serve.py``: ``tokenizer``, ``chat_format``, ``max_running`` are read.

    Raises:
        ValueError: the folder, or a tokenizer without a chat format.
    """
    opened = open_model(folder, None)
    place = args.tokenizer or tokenizer_folder(opened)
    from megatron_k2.engine.server.models import open_format

    chat_format = open_format(place, args.chat_format)
    return make_engine(opened, None, THREADS, args.max_running or SERVED), chat_format


def tokenizer_folder(opened: OpenedModel) -> str:
    """Return the folder of a model's tokenizer."""
    path = Path(opened.args.tokenizer_model or "")
    return str(path if path.is_dir() else path.parent)


class Terminal:
    """Prompts and dialogues over an engine, written to standard output."""

    def __init__(self, engine: Engine, opened: OpenedModel, args: argparse.Namespace) -> None:
        self._engine, self._tokenizer, self._args = engine, opened.tokenizer, args
        self._names = itertools.count()

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """Return the flags' rules."""
        args = self._args
        return Sampling(
            args.max_tokens, args.temperature, args.top_p, args.top_k, args.seed, stop_ids
        )

    def _pieces(self, prompt: list[int], stop_ids: tuple[int, ...]) -> AsyncIterator[Piece]:
        request = Request(str(next(self._names)), tuple(prompt), self.sampling(stop_ids))
        return self._engine.stream(request)

    async def continue_text(self, text: str) -> None:
        """Print a prompt and its continuation."""
        tokenizer = self._tokenizer
        eod = tokenizer.eod
        prompt = tokenizer.tokenize(text) or [eod]
        reader = PlainParser(tokenizer.detokenize, (eod,), prompt)
        print(text, end="", flush=True)
        async for piece in self._pieces(prompt, (eod,)):
            print(_text(reader.feed(piece.ids)), end="", flush=True)
        print(_text(reader.finish()[0]), flush=True)

    async def chat(self, chat_format: ChatFormat, lines: Iterator[str]) -> None:
        """Answer each line until there are no more, or /quit.

        A line that the context has no room for is not taken, and said so.
        """
        start = [dict(role="system", content=self._args.system)] if self._args.system else []
        messages: list[dict[str, Any]] = list(start)
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.strip() == "/reset":
                messages = list(start)
                continue
            asked = [*messages, dict(role="user", content=line.rstrip("\n"))]
            if len(chat_format.encode(asked)) >= self._engine.max_context:
                most = self._engine.max_context
                print(
                    f"(the context of {most} tokens is full: /reset begins anew)", file=sys.stderr
                )
                continue
            messages = [*asked, await self._answer(chat_format, asked)]

    async def _answer(
        self, chat_format: ChatFormat, messages: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Print one answer and return it as a message."""
        reader = chat_format.parser(messages)
        async for piece in self._pieces(chat_format.encode(messages), chat_format.stop_ids):
            for event in reader.feed(piece.ids):
                print(event.text if isinstance(event, TextDelta) else event, end="", flush=True)
        events, parsed = reader.finish()
        print(_text(events), flush=True)
        for problem in parsed.problems:
            print(f"({problem})", file=sys.stderr)
        return parsed.message


def _text(events: Sequence[Event]) -> str:
    return "".join(one.text for one in events if isinstance(one, TextDelta))


async def _serve_terminal(
    engine: Engine, opened: OpenedModel, args: argparse.Namespace, chat_format: ChatFormat | None
) -> None:
    terminal = Terminal(engine, opened, args)
    try:
        if chat_format is not None:
            await terminal.chat(chat_format, _typed("you> "))
            return
        for text in args.prompt or (line.rstrip("\n") for line in _typed("prompt> ")):
            await terminal.continue_text(text)
    finally:
        await engine.close()


def _typed(prompt: str) -> Iterator[str]:
    """Yield lines of standard input, asking for them in a terminal."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Generate what the flags ask for.

    Raises:
        ValueError: a flag or a folder that cannot be used.
    """
    Sampling(args.max_tokens, args.temperature, args.top_p, args.top_k)
    if args.chat and args.prompt:
        raise UsageError("--chat and --prompt exclude each other")
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads} must be 1 or more")
    opened = open_model(args.load, args.k2_load_hf, flags)
    chat_format = None
    if args.chat:
        from megatron_k2.engine.server.models import open_format

        chat_format = open_format(tokenizer_folder(opened), args.chat_format)
    engine = make_engine(opened, args.max_context, args.threads)
    asyncio.run(_serve_terminal(engine, opened, args, chat_format))


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    args, flags = parser().parse_known_args(argv)
    return run_tool(lambda: run(args, flags))


if __name__ == "__main__":
    sys.exit(main())
