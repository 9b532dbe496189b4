"""Flags of `tools/rephrase_data.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_k2.data.rephrase.fidelity import CHECKS, DEFAULT_CHECKS, Thresholds
from megatron_k2.data.rephrase.prompts import TASKS
from megatron_k2.data.rephrase.settings import POLICIES

DESCRIPTION = """Rewrite documents in sampled styles and perspectives with a language model, chunk
by chunk with what was rewritten so far as context; keep what passes the checks of fidelity.
OUT/parts/ holds the result, JSONL with "text" and its provenance. Run again after any stop, it goes
on."""
EXAMPLES = """
examples:
  # vLLM or SGLang on this machine; two rewritings a document, 64 requests at a time
  tools/rephrase_data.py --input 'wiki/*.jsonl.zst' --output out/wiki --rephrasings 2 \\
    --server http://localhost:8000/v1 --model Qwen/Qwen3-32B --concurrency 64
  # a hosted server, its key from the environment, with a judge and a limit to what it may cost
  OPENAI_API_KEY=... tools/rephrase_data.py --input notes.jsonl --output out/notes \\
    --server https://api.example.com/v1 --model big --checks numbers units dates names judge \\
    --judge-model big --max-tokens 5000000
  # mathematics as learning notes in English, whatever language it is in
  tools/rephrase_data.py --input math.jsonl --output out/math --task learning-note ...
  # what a prompt looks like, and what may be named in --styles and --perspectives
  tools/rephrase_data.py --list-prompts
  # on a Ray cluster whose nodes share the folders
  tools/rephrase_data.py ... --ray --ray-workers 16 --concurrency 1024
  # then tokenise
  tools/preprocess_data.py --input 'out/wiki/parts/*.jsonl' ...
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        prog="rephrase_data.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_texts(found.add_argument_group("texts"))
    _add_prompts(found.add_argument_group("prompts"))
    _add_model(found.add_argument_group("model"))
    add_checks(found.add_argument_group("checks"))
    _add_limits(found.add_argument_group("requests and limits"))
    return found


def _add_texts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input", nargs="+", default=[], metavar="GLOB", help="JSONL (.gz, .zst) or plain text")
    add("--output", type=Path, metavar="DIR", help="folder of the run")
    add("--text-field", default="text", metavar="NAME", help="of JSON objects; default text")
    add(
        "--skip-bad-records",
        action="store_true",
        help="leave out and count lines that are no documents; default: they end the run before "
        "anything is asked",
    )
    add("--limit", type=int, metavar="N", help="rewrite the first N documents only")
    add(
        "--documents-per-part",
        type=int,
        default=256,
        metavar="N",
        help="of a file that is published at once; default 256",
    )
    add("--chunk-tokens", type=int, default=256, metavar="N", help="rewritten at once; default 256")
    add("--excerpt-tokens", type=int, default=4096, metavar="N", help="shown with it; default 4096")
    add(
        "--tokenizer-model",
        type=Path,
        metavar="FILE",
        help="sentencepiece or Kimi tokenizer that counts tokens; default: estimated from bytes",
    )


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--task", choices=TASKS, default="rewrite", help="default rewrite")
    add(
        "--rephrasings",
        type=int,
        default=1,
        metavar="N",
        help="of each document, all different; Kimi K2 made at most 2; default 1",
    )
    add("--styles", nargs="+", default=[], metavar="NAME", help="to sample from; default all")
    add("--perspectives", nargs="+", default=[], metavar="NAME", help="default all")
    add(
        "--language",
        default="",
        metavar="CODE",
        help="to write in (en de fr es zh ...); default: the source's, for learning notes en",
    )
    add(
        "--prompts",
        type=Path,
        metavar="DIR",
        help="own prompt files, one a language; default: the package's",
    )
    add("--list-prompts", action="store_true", help="print the prompts and leave")
    add("--seed", type=int, default=1, help="of prompts and samplers; default 1")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--server", metavar="URL", help="OpenAI-compatible, with /v1")
    add("--model", metavar="NAME", help="that the server knows")
    add(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable of the environment that holds the key; default OPENAI_API_KEY",
    )
    add("--temperature", type=float, default=0.0, help="default 0: the same bytes again")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--max-new-tokens", type=int, default=0, metavar="N", help="of an answer; default 4 chunks")
    add(
        "--extra-body",
        default="{}",
        metavar="JSON",
        help="more fields of each request, "
        'such as {"chat_template_kwargs": {"enable_thinking": false}} for a model that thinks',
    )
    add(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="of a chunk, each with its own seed; default 3",
    )
    add(
        "--retry-temperature",
        type=float,
        default=0.7,
        help="at least, of later attempts; default 0.7",
    )
    add(
        "--on-failure",
        choices=POLICIES,
        default="drop",
        help="of all attempts: leave the chunk out, keep its source, or leave its document "
        "out; default drop",
    )


def add_checks(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how fidelity is judged."""
    add, least = group.add_argument, Thresholds()
    add(
        "--checks",
        nargs="+",
        choices=CHECKS,
        default=list(DEFAULT_CHECKS),
        metavar="NAME",
        help=f"of {' '.join(CHECKS)}; default all but the last two, which need a model",
    )
    add(
        "--check-processes",
        type=int,
        default=0,
        metavar="N",
        help="for checks without a model, some 30 ms of a core a chunk; default: a thread",
    )
    add(
        "--embedder",
        default="hashed-ngrams",
        metavar="NAME",
        help="hashed-ngrams (letters, not meaning; the default), hf:FOLDER, or endpoint",
    )
    add("--embedding-server", metavar="URL", help="default --server")
    add("--embedding-model", default="", metavar="NAME")
    add(
        "--min-similarity",
        type=float,
        default=least.similarity,
        help=f"cosine of whole chunks; default {least.similarity}, for hashed-ngrams; MiniLM: 0.7",
    )
    add(
        "--min-sentence-similarity",
        type=float,
        default=least.sentence_similarity,
        help=f"of a sentence and its nearest; default {least.sentence_similarity}",
    )
    add("--entailment", default="", metavar="NAME", help="hf:FOLDER or MODULE:FUNCTION")
    add("--min-entailment", type=float, default=least.entailment, help="probability; default 0.5")
    add("--judge-server", metavar="URL", help="default --server")
    add("--judge-model", default="", metavar="NAME")
    add("--min-judge", type=float, default=least.judge, help="score of 10; default 7")
    add(
        "--length-bounds",
        type=float,
        nargs=2,
        default=[0.3, 4.0],
        metavar=("LEAST", "MOST"),
        help="characters of a rewriting to its chunk's; default 0.3 4",
    )
    add(
        "--may-copy",
        action="store_true",
        help="accept a chunk that is nearly its source word by word",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="requests under way at most; fewer where the server says 429; default 32",
    )
    add("--timeout-s", type=float, default=300.0, metavar="S", help="of a request; default 300")
    add(
        "--max-tries",
        type=int,
        default=8,
        metavar="N",
        help="of a request that fails by itself; default 8",
    )
    add("--max-requests", type=int, metavar="N", help="of the run, resumed or not")
    add("--max-tokens", type=int, metavar="N", help="of the run, read and written, resumed or not")
    add("--ray", action="store_true", help="spread parts over Ray; needs megatron-k2[data]")
    add(
        "--ray-address",
        default="",
        metavar="ADDRESS",
        help="default: this machine, or the cluster's",
    )
    add(
        "--ray-workers",
        type=int,
        default=2,
        metavar="N",
        help="share the concurrency; default 2",
    )
    add("--quiet", action="store_true", help="no progress bar")
