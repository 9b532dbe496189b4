"""Tokenising a corpus to ``.bin/.idx``: tools/preprocess_data.py against Megatron's own.

Corpus: sources and texts of the Python library and of the installed packages (``--megabytes``), or
``--input``. Vocabulary: 65,536 byte-pair tokens learnt from it with Kimi's regular expression, as
``tiktoken.model`` and as ``tokenizer.json`` of the same ids, with Kimi's 256 special ids behind.
Contestants, each in a process of its own with one worker, ours between the others, whole runs with
start and import: ours with either file; Megatron's ``HuggingFaceTokenizer`` (what its users have),
and its script with ``KimiTiktokenTokenizer`` of this package. Documents that name a control token
or are cut by Kimi's rules are left out, because there the two files differ by intent; all outputs
must then be the same bytes. Megatron's script is that of ``MEGATRON_LM_PATH``, else a stand-in
(stock_preprocess.py). CPU seconds count, with those of children: the bar is 30 times per core.
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import print_json, print_table

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 65_536
LEARN_FROM_EVERY = 8
SUFFIXES = (".py", ".rst", ".txt", ".md")
CONTROL = ("<|", "[BOS]", "[EOS]", "[EOT]", "[UNK]", "[PAD]")
MAX_CHARS = 25_000
"""A text within Kimi's limit of characters in a row is never cut."""


@dataclass(frozen=True)
class Run:
    """What one whole run took."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    """Of its largest process."""


def read_texts(num_bytes: int) -> Iterator[str]:
    """Yield texts of files until there are so many bytes."""
    left = num_bytes
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) > MAX_CHARS:  # whole lines of it
                text = text[: text.rfind("\n", 0, MAX_CHARS) + 1]
            if text and not any(name in text for name in CONTROL):
                yield text
                left -= len(text.encode())
                if left <= 0:
                    return


def make_vocabulary(folder: Path, corpus: Path) -> None:
    """Learn the vocabulary and write it in both forms."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from megatron_k2.chat.special_tokens import special_tokens
    from megatron_k2.chat.tokenizer import PATTERN
    from megatron_k2.data.kimi_tokenizer import byte_characters

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    with corpus.open(encoding="utf-8") as lines:
        sample = (json.loads(x)["text"] for n, x in enumerate(lines) if n % LEARN_FROM_EVERY == 0)
        tokenizer.train_from_iterator(sample, trainer)
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = sorted((i, bytes(map(bytes_of.get, t))) for t, i in tokenizer.get_vocab().items())
    (folder / "kimi").mkdir()
    (folder / "kimi" / "tiktoken.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)
    )
    names = sorted(special_tokens({}, len(ranks)).items(), key=lambda item: item[1])
    tokenizer.add_special_tokens([name for name, _ in names])
    (folder / "hf").mkdir()
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[EOS]"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(config))


def measure(command: list[str]) -> Run:
    """Run a command to its end."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command}: {output.read()[-2000:].decode()}")
    wall_s = time.monotonic() - began
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def tokenizer_flags(folder: Path, kind: str) -> list[str]:
    """Return the flags of one form of the vocabulary."""
    name = {"kimi": "KimiTiktokenTokenizer", "hf": "HuggingFaceTokenizer"}[kind]
    return ["--tokenizer-type", name, "--tokenizer-model", str(folder / kind), "--append-eod"]


def megatron_script() -> tuple[list[str], str]:
    """Return the command of Megatron's script, and what it is."""
    if checkout := os.environ.get("MEGATRON_LM_PATH"):
        script, name = Path(checkout) / "tools" / "preprocess_data.py", "Megatron's script"
    else:
        script, name = Path(__file__).with_name("stock_preprocess.py"), "stand-in of it"
    # With this package registered, which the type KimiTiktokenTokenizer needs.
    command = [sys.executable, "-m", "megatron_k2", "--k2-megatron", "wheel", str(script)]
    return command, name


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Run all contestants below one folder."""
    corpus = options.input or folder / "corpus.jsonl"
    if not options.input:
        with corpus.open("w", encoding="utf-8") as file:
            for text in read_texts(options.megabytes * 10**6):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    # Not here: a child's peak begins with the memory of the process that starts it.
    learn = [sys.executable, __file__, "--learn", str(folder), str(corpus)]
    subprocess.run(learn, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    stock, stock_name = megatron_script()
    runs: dict[str, list[Run]] = {}

    def run(name: str, tool: list[str], kind: str, workers: int = 1, copies: int = 1) -> None:
        prefix = folder / f"{name}-{len(runs.get(name, ()))}"
        inputs = (
            [str(folder / f"copy-{n}.jsonl") for n in range(copies)] if copies > 1 else [corpus]
        )
        command = [*tool, "--input", *map(str, inputs), "--output-prefix", str(prefix)]
        command += [*tokenizer_flags(folder, kind), "--workers", str(workers)]
        runs.setdefault(name, []).append(measure(command))
        for suffix in (".bin", ".idx"):
            found = Path(f"{prefix}_text_document{suffix}")
            first = folder / f"first{suffix}"
            if copies == 1 and not first.exists():
                found.rename(first)
                continue
            if copies == 1 and not filecmp.cmp(first, found, shallow=False):
                raise SystemExit(f"{name}: {found} is not {first}")
            found.unlink()

    run("k2-kimi", ours, "kimi")
    run("k2-hf", ours, "hf")
    run("megatron-hf", stock, "hf")
    run("k2-kimi", ours, "kimi")
    run("k2-hf", ours, "hf")
    run("megatron-kimi", stock, "kimi")
    run("k2-kimi", ours, "kimi")
    run("k2-kimi-2-workers", ours, "kimi", workers=2)
    for number in range(options.copies):
        (folder / f"copy-{number}.jsonl").symlink_to(corpus)
    run(f"k2-kimi-x{options.copies}", ours, "kimi", copies=options.copies)
    report(runs, corpus, (folder / "first.bin").stat().st_size // 4, stock_name, options.copies)


def report(
    runs: dict[str, list[Run]], corpus: Path, num_tokens: int, stock_name: str, copies: int
) -> None:
    """Print the table and the figures."""
    cpu = {name: statistics.median(run.cpu_s for run in some) for name, some in runs.items()}
    rows: list[tuple[Any, ...]] = []
    for name, some in runs.items():
        tokens = num_tokens * (copies if name.startswith("k2-kimi-x") else 1)
        wall_s = statistics.median(run.wall_s for run in some)
        rss = max(run.peak_rss_bytes for run in some)
        rows.append(
            (name, f"{wall_s:.1f} s", f"{cpu[name]:.2f} s", f"{tokens / cpu[name] / 1e6:.2f} M",
             f"{rss / 1e6:.0f} MB", len(some))
        )  # fmt: skip
    size = corpus.stat().st_size / 1e6
    print_table(
        f"{size:.0f} MB, {num_tokens:,} tokens with EOD; all outputs of one corpus are the same "
        f"bytes; megatron-* is {stock_name}",
        ("contestant", "wall", "CPU", "tokens / CPU s", "largest process", "runs"),
        rows,
    )
    many = f"k2-kimi-x{copies}"
    marginal_s = (cpu[many] - cpu["k2-kimi"]) / (copies - 1)
    print(
        f"  without start: {num_tokens / marginal_s / 1e6:.1f} M tokens / CPU s (a further copy of "
        "the corpus; the tokenizer has seen its words)"
    )
    print_json(
        vs_megatron_per_core=cpu["megatron-hf"] / cpu["k2-kimi"],
        hf_vs_megatron_per_core=cpu["megatron-hf"] / cpu["k2-hf"],
        vs_megatron_with_our_kimi_tokenizer=cpu["megatron-kimi"] / cpu["k2-kimi"],
        peak_rss_bytes=max(run.peak_rss_bytes for run in runs["k2-kimi"]),
        peak_rss_bytes_of_copies=runs[many][0].peak_rss_bytes,
        tokens_per_cpu_s=num_tokens / cpu["k2-kimi"],
        documents_identical=True,
        megatron=stock_name,
    )


def main() -> None:
    """Make the corpus, run everything, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--copies", type=int, default=4, help="of the corpus, for the memory")
    parser.add_argument("--input", type=lambda path: Path(path).resolve(), help="JSONL")
    parser.add_argument("--learn", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.learn:
        make_vocabulary(*options.learn)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), options)


if __name__ == "__main__":
    main()
