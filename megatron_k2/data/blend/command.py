"""What `tools/blend_data.py` does: check, emit, report."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.blend.allotment import Allotment, allot
from megatron_k2.data.blend.corpora import Tokens, check_tokenizers, open_corpus
from megatron_k2.data.blend.manifest import Manifest, ReadRecipe, read_manifest
from megatron_k2.data.blend.picture import draw
from megatron_k2.data.blend.repetition import (
    Uses,
    check_rephrasings,
    count_sources,
    overlaps,
    uses_of,
)
from megatron_k2.data.blend.report import figures, lines
from megatron_k2.data.blend.rewritings import Rewritings, read_rewritings
from megatron_k2.data.blend.slices import SPLIT, check_output, data_args_name, write_blend

_EXAMPLES = """examples:
  tools/blend_data.py check blend.toml                  # tables; what would be seen too often
  tools/blend_data.py emit blend.toml --output blend    # what Megatron reads, and the report
  tools/blend_data.py report blend.toml --output seen   # the report alone, as text and picture

a manifest:
  seed = 1
  recipe = "examples/kimi_k2_1t/recipe.toml"            # budgets of the stages
  rephrasings_per_document = 2                          # at most

  [[corpora]]
  name = "knowledge"
  prefix = "${DATA}/knowledge_text_document"            # of .bin and .idx
  domain = "knowledge"
  language = "en"

  [[corpora]]
  name = "knowledge-rephrased"
  prefix = "${DATA}/knowledge_rephrased_text_document"
  domain = "knowledge"
  rephrasing_of = "knowledge"                           # style and language: by document

  [[stages]]
  name = "stable"
  weights = { knowledge = 0.4, knowledge-rephrased = 0.6 }

  [[stages]]                                            # without a recipe
  name = "annealing"
  epochs = { knowledge = 0.1 }                          # or weights with tokens or steps
  seq_length = 4096
  global_batch_size = 1024

Each stage of a training must start its data anew: --k2-stage-start, which tools/run_recipe.py sets.
"""


@dataclass
class Blend:
    """A manifest with all that was read of its corpora and what was dealt out."""

    manifest: Manifest
    corpora: dict[str, Tokens]
    rewritings: dict[str, Rewritings]
    allotment: Allotment
    uses: Uses


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's command line."""
    found = argparse.ArgumentParser(
        description="Blends tokenised corpora so that no token is seen more often than asked.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = found.add_subparsers(dest="command", required=True)
    texts = {
        "check": "say what would be seen too often; status 1 if anything would",
        "emit": "check, then write what Megatron reads, and the report",
        "report": "write report.txt, report.json and report.png",
    }
    for name, text in texts.items():
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("manifest", type=Path, help="TOML file, see tools/blend_data.py --help")
        if name != "check":
            one.add_argument("--output", type=Path, required=True, help="folder to make")
    return found


def run(args: argparse.Namespace, read_recipe: ReadRecipe) -> list[str]:
    """Do what the flags say.

    Args:
        args: of ``parser``.
        read_recipe: gives the budgets of a recipe's stages.

    Returns:
        What would be seen too often, a line each; then nothing is written.

    Raises:
        ValueError: the manifest or a corpus cannot be used.
    """
    if args.command != "check":
        check_output(args.output)
    blend, problems = read_blend(args.manifest, read_recipe)
    if problems:
        return problems
    sources = count_sources(blend.corpora, blend.rewritings, blend.uses)
    found = figures(
        blend.manifest, blend.corpora, blend.rewritings, blend.allotment.takes, blend.uses, sources
    )
    print("\n".join(lines(found)))
    if args.command == "check":
        print("\n[blend] no token is seen more often than asked")
        return []
    _write(args, blend, found)
    return []


def read_blend(path: Path, read_recipe: ReadRecipe) -> tuple[Blend, list[str]]:
    """Read a manifest and its corpora, and deal documents out.

    Returns:
        The blend, and what stands against it, a line each.

    Raises:
        ValueError: the manifest or a corpus cannot be used.
    """
    manifest = read_manifest(path, read_recipe)
    corpora = {corpus.name: open_corpus(corpus) for corpus in manifest.corpora}
    read = {name: read_rewritings(tokens) for name, tokens in corpora.items()}
    rewritings = {name: found for name, found in read.items() if found is not None}
    allotment = allot(manifest, corpora)
    uses = uses_of(corpora, allotment.takes)
    problems = [*check_tokenizers(corpora), *overlaps(corpora), *allotment.problems]
    problems += check_rephrasings(manifest, rewritings, uses)
    return Blend(manifest, corpora, rewritings, allotment, uses), problems


def _write(args: argparse.Namespace, blend: Blend, found: dict[str, Any]) -> None:
    unfinished = args.output.with_name(args.output.name + ".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    (unfinished / "report.txt").write_text("\n".join(lines(found)) + "\n")
    (unfinished / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, unfinished / "report.png")
    if args.command == "emit":
        write_blend(
            args.output, unfinished, blend.corpora, blend.allotment.takes, blend.manifest.scale
        )
    os.replace(unfinished, args.output)
    print(f"\n[blend] {args.output}: report.txt, report.json and report.png")
    if args.command != "emit":
        return
    for stage in blend.manifest.stages:
        name = stage.budget.name
        print(f"[blend] {name}: --data-args-path {args.output / data_args_name(name)}")
    print(
        f"[blend] with --split {SPLIT} and, in every stage, --k2-stage-start; or append "
        f"{args.output / 'recipe-scale.toml'} to the recipe"
    )
