"""``tools/preprocess_data.py``: stock Megatron's arguments, and what they lack."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.data.preprocess import publish
from megatron_k2.data.preprocess.claim import read_prefix
from megatron_k2.data.preprocess.encoders import ENGINES, TOKENIZER_TYPES
from megatron_k2.data.preprocess.job import DEDUP, Job
from megatron_k2.data.preprocess.merge import Totals
from megatron_k2.data.preprocess.provenance import where
from megatron_k2.data.preprocess.records import Options
from megatron_k2.data.preprocess.run import run
from megatron_k2.data.preprocess.sources import FORMATS, find_sources
from megatron_k2.inputs import positive_int

EPILOG = """\
examples:
  # Kimi K2's tokenizer over all shards; one -> PREFIX_text_document.bin and .idx
  preprocess_data.py --input 'shards/*.jsonl.zst' --output-prefix data/web \\
      --tokenizer-type KimiTiktokenTokenizer --tokenizer-model Kimi-K2-Base --append-eod --workers 8
  # Parquet with a column "content", copies and near copies left out
  preprocess_data.py --input 'code/**/*.parquet' --json-keys content --output-prefix data/code \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --append-eod \\
      --dedup minhash
  # learn a sentencepiece model from the same input
  preprocess_data.py train-tokenizer --input 'shards/*.jsonl' --vocab-size 32000 --output spm.model
  # check an output's checksums; ask where document 17 came from
  preprocess_data.py verify data/web
  preprocess_data.py where data/web 17

Killed at any moment, the same command goes on, and the bytes are the same; so they are for any
--workers. Files appear when all are whole. PREFIX.json has checksums and counts.
"""


def preprocess(argv: Sequence[str] | None = None) -> list[str] | None:
    """Do what the command line says; return what is wrong with a verified output.

    Raises:
        ValueError: bad input; the message names the flag.
        RuntimeError: a worker died.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"verify": _verify, "where": _where, "train-tokenizer": _train}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    args = parser().parse_args(arguments)
    job, prefix = _job(args), read_prefix(args.output_prefix)
    if args.partitions > 1 and not args.keep_sequential_samples:
        print(
            f"--partitions {args.partitions}: documents stay in the order of the input, as with "
            "stock Megatron's --keep-sequential-samples",
            file=sys.stderr,
        )
    encoder = job.encoder()
    if args.append_eod and encoder.eod is None:
        raise ValueError(
            f"--append-eod: {args.tokenizer_model} names no token that ends a document"
        )
    folder = prefix.with_name(prefix.name + ".partial")
    before = publish.done_before(folder, prefix, job, job.settings(encoder))
    totals = before or run(job, encoder, prefix, args.workers, args.commit_s)
    _print(totals, job, prefix, "written before, as asked for now:" if before else "wrote")
    return None


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    found = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Documents to Megatron's .bin/.idx: streaming, resumable, exact.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = found.add_argument_group("input")
    _add_input(group)
    group.add_argument(
        "--split-sentences", action="store_true",
        help="a sequence a sentence; each value must be a list of sentences",
    )  # fmt: skip
    _add_tokenizer(found.add_argument_group("tokenizer"))
    group = found.add_argument_group("documents")
    group.add_argument(
        "--dedup", choices=DEDUP, default="none",
        help="leave out exact copies; minhash: near copies too. The first one stays",
    )  # fmt: skip
    _add_run(found.add_argument_group("output and run"))
    return found


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="files and globs ('**' crosses folders); .gz and .zst are unpacked",
    )  # fmt: skip
    group.add_argument(
        "--input-format", choices=("auto", *FORMATS), default="auto",
        help="auto: .jsonl, .ndjson, .json, .parquet, and everything else is text",
    )  # fmt: skip
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="fields or columns with text; an output each",
    )  # fmt: skip
    group.add_argument(
        "--text-documents", choices=("file", "line"), default="file",
        help="what a document is in a text file",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad-records", action="store_true",
        help="count lines that are no JSON, no UTF-8 or have no text, and go on",
    )  # fmt: skip


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokenizer-type", required=True, help=", ".join(TOKENIZER_TYPES))
    group.add_argument(
        "--tokenizer-model", required=True,
        help="a release's folder or tiktoken.model; tokenizer.json or its folder; a sentencepiece "
        "model",
    )  # fmt: skip
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the EOD token"
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens", action="store_true",
        help="leave out what a Hugging Face tokenizer adds to each text, such as BOS",
    )  # fmt: skip
    group.add_argument(
        "--control-tokens", choices=("text", "ids"), default="text",
        help='what "<|im_end|>" in a document is: text, and counted (default), or the control '
        "token, as stock Megatron has it; only for text that you wrote",
    )  # fmt: skip
    group.add_argument(
        "--engine", choices=ENGINES, default="auto",
        help="fast: fastokens, checked against the reference (tiktoken, tokenizers) as it runs; "
        "auto: where it is installed and reads this tokenizer",
    )  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    group.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1,
        help="processes (default: all cores); no effect on the bytes",
    )  # fmt: skip
    group.add_argument(
        "--partitions", type=positive_int, default=1,
        help="stock's; any number gives the same bytes, no partition files are written",
    )  # fmt: skip
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="stock's; always so here"
    )
    group.add_argument(
        "--log-interval", type=positive_int, default=1000, help="stock's; there is a bar instead"
    )
    group.add_argument(
        "--block-bytes", type=positive_int, default=Options.block_bytes,
        help="text of one piece of work; a kill costs the pieces under way (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--commit-s", type=float, default=10.0,
        help="seconds between two flushes of the output to the disk (default: %(default)s)",
    )  # fmt: skip


def _job(args: argparse.Namespace) -> Job:
    return Job(
        sources=find_sources(args.input, args.input_format),
        options=_options(args),
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        engine=args.engine,
        control_tokens=args.control_tokens,
        add_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        dedup=args.dedup,
    )


def _options(args: argparse.Namespace) -> Options:
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ValueError(f"--json-keys {' '.join(args.json_keys)}: a key is there twice")
    return Options(
        json_keys=tuple(args.json_keys),
        block_bytes=getattr(args, "block_bytes", Options.block_bytes),
        text_documents=args.text_documents,
        skip_bad_records=args.skip_bad_records,
    )


def _print(totals: Totals, job: Job, prefix: Path, done: str) -> None:
    """Print what was done."""
    tokens = ", ".join(
        f"{count:,} tokens of {key}"
        for key, count in zip(job.options.json_keys, totals.num_tokens, strict=True)
    )
    print(f"{totals.num_documents:,} documents ({totals.num_empty:,} empty), {tokens}")
    if job.dedup != "none":
        print(
            f"left out: {totals.num_exact_duplicates:,} exact and {totals.num_near_duplicates:,} "
            "near duplicates"
        )
    if totals.num_bad:
        print(f"left out: {totals.num_bad:,} bad records")
    if totals.control_texts:
        meant = "text" if job.control_tokens == "text" else "control tokens"
        most = sorted(totals.control_texts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in most[:5])
        print(f"names of control tokens in the input, kept as {meant}: {shown}")
    print(f"{done} {', '.join(str(p) for p in publish.outputs(prefix, job).values())}")


def _verify(argv: list[str]) -> list[str] | None:
    sub = argparse.ArgumentParser(prog="preprocess_data.py verify")
    sub.add_argument("prefix", help="what --output-prefix was")
    prefix = sub.parse_args(argv).prefix
    problems = publish.verify(prefix)
    if not problems:
        print(f"{prefix}: all files are as they were written")
    return problems


def _where(argv: list[str]) -> None:
    sub = argparse.ArgumentParser(prog="preprocess_data.py where")
    sub.add_argument("prefix", help="what --output-prefix was")
    sub.add_argument("document", type=int, help="its number, from 0 on")
    args = sub.parse_args(argv)
    found = where(args.prefix, args.document)
    print(" ".join(f"{name}={value}" for name, value in found.items()))


def _train(argv: list[str]) -> None:
    from megatron_k2.data.preprocess.train import TYPES, train

    sub = argparse.ArgumentParser(
        prog="preprocess_data.py train-tokenizer",
        description="Learn a sentencepiece model (BPE, byte fallback) for "
        "--tokenizer-type SentencePieceTokenizer, or a tiktoken.model of Kimi's construction, "
        "chat tokens included, for KimiTiktokenTokenizer.",
    )
    sub.add_argument("--type", choices=TYPES, default="sentencepiece")
    _add_input(sub.add_argument_group("input"))
    sub.add_argument("--vocab-size", type=positive_int, required=True)
    sub.add_argument("--output", required=True, help="the model file")
    sub.add_argument(
        "--sample-bytes", type=positive_int, default=64_000_000,
        help="text to learn from, taken evenly from all input (default: %(default)s)",
    )  # fmt: skip
    args = sub.parse_args(argv)
    sources = find_sources(args.input, args.input_format)
    train(sources, _options(args), args.vocab_size, Path(args.output), args.sample_bytes, args.type)
