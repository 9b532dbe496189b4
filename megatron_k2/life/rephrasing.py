"""``python -m megatron_k2.life.rephrasing``: rephrase the invented people, by a rule.

Flags are those of ``rephrase_data.py``, but for ``--server``: a rule that knows these documents
(``data/facts_corpus/rewriter.py``) answers over HTTP as a language model does, and every
answer passes the same checks. ``documents.jsonl`` gathers the sources and what was kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.data.facts_corpus.rewriter import RuleRewriter
from megatron_k2.data.facts_corpus.server import serving
from megatron_k2.data.rephrase.command import run
from megatron_k2.data.rephrase.flags import parser
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.stages import read_json, write_json

# Sentences of five words share too few letters with their rewritings for the default, 0.28: a third
# of faithful answers would be asked for again (examples/rephrasing).
SHORT_SENTENCES = ["--min-sentence-similarity", "0.15"]


def rephrase(argv: list[str]) -> list[str]:
    """Rewrite, and gather what was kept; return what stopped it, a line each.

    Raises:
        ValueError: a flag or an input that cannot be used.
    """
    with serving(RuleRewriter()) as url:
        flags = ["--server", url, "--model", "rule", *SHORT_SENTENCES, *argv]
        args = parser().parse_args(flags)
        failed = run(args)
    if not failed:
        gather([Path(path) for path in args.input], args.output)
    return failed


def gather(sources: list[Path], output: Path) -> None:
    """Write sources and rewritings as one file of documents, and what there is of each."""
    texts = [line["text"] for path in sources for line in _lines(path)]
    rewritten = [
        line for path in sorted((output / "parts").glob("*.jsonl")) for line in _lines(path)
    ]
    documents = [*texts, *(line["text"] for line in rewritten)]
    body = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    publish_text(output / "documents.jsonl", body + "\n")
    figures = {"sources": len(texts), "rewritten": len(rewritten), "documents": len(documents)}
    sample = rewritten[0]["text"] if rewritten else ""
    counts = read_json(output / "report.json") or {}
    write_json(output / "figures.json", {**figures, "sample": sample, "report": counts})
    print(f"[rephrase] {len(texts)} documents, {len(rewritten)} rewritings of them")


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = sys.argv[1:] if argv is None else argv
    return run_tool(lambda: rephrase(given))


if __name__ == "__main__":
    sys.exit(main())
