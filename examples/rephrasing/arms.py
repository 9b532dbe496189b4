"""The texts of the three arms: invented facts, rewritten, tokenised and dealt out by the tools.

Each step calls what a tool's command line calls, and prints that command line. What is done is
skipped: texts are published whole, the tools go on by themselves.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.blend import command as blend
from megatron_k2.data.facts_corpus.people import Person, World
from megatron_k2.data.facts_corpus.rewriter import RuleRewriter
from megatron_k2.data.facts_corpus.server import serving
from megatron_k2.data.facts_corpus.texts import background_documents
from megatron_k2.data.facts_corpus.wordings import questions, source_document
from megatron_k2.data.preprocess.command import preprocess
from megatron_k2.data.rephrase import command as rephrase
from megatron_k2.data.rephrase.flags import parser as rephrase_parser
from megatron_k2.training import stages

EXPOSURES = 10  # of each person's facts in every arm, as in the report's table
ARMS = {  # arm -> corpus and epochs
    "raw x 10": ("source", EXPOSURES),
    "1 x 10": ("rewritten-1", EXPOSURES),
    "10 x 1": ("rewritten-10", 1),
}
CORPORA = ("source", "rewritten-1", "rewritten-10", "background", "heldout")
# Sentences are so short here that letters tell little of them; the default, 0.28, is for prose.
MIN_SENTENCE_SIMILARITY = 0.15
HELDOUT_PEOPLE = 100
HELDOUT_REWRITINGS = 2


@dataclass(frozen=True)
class Setting:
    """What the texts depend on."""

    world: int = 1
    people: int = 64
    background_people: int = 64
    background_rewritings: int = 200
    vocab_size: int = 2048
    seq_length: int = 128
    base_batch: int = 8
    base_steps: int = 600
    batch: int = 4
    facts_share: float = 0.5
    """Of the arms' sequences at most; the rest is background that the base model has not seen."""


@dataclass(frozen=True)
class Folders:
    """Where everything of an experiment is."""

    output: Path

    def texts(self, name: str) -> Path:
        """Return the file of invented text of a name."""
        return self.output / "texts" / f"{name}.jsonl"

    def tokens(self, corpus: str) -> Path:
        """Return the prefix of a corpus for tools/preprocess_data.py."""
        return self.output / "tokens" / corpus

    @property
    def tokenizer(self) -> Path:
        """The sentencepiece model of all text."""
        return self.output / "tokens" / "tokenizer.model"

    def blend(self, arm: str) -> Path:
        """Return the folder that tools/blend_data.py wrote for an arm."""
        return self.output / "blends" / arm.replace(" ", "")

    def num_tokens(self, corpus: str) -> int:
        """Return the tokens of a corpus."""
        summary = json.loads(self.tokens(corpus).with_suffix(".json").read_text())
        return int(summary["totals"]["num_tokens"][0])


def say(stage: str, text: str) -> None:
    """Print what a stage did."""
    print(f"[{stage}] {text}", flush=True)


def run_tool(tool: str, run: Callable[[list[str]], Any], *arguments: object) -> None:
    """Run a tool in this process, and print its command line.

    Raises:
        RuntimeError: it tells of something that stopped it.
    """
    words = [str(argument) for argument in arguments]
    say("run", shlex.join([f"tools/{tool}", *words]))
    if failed := run(words):
        raise RuntimeError(f"tools/{tool}: {'; '.join(map(str, failed))}")


def make_texts(to: Folders, chosen: Setting) -> World:
    """Invent people and write their source documents, the background, what is held out, questions.

    Returns:
        The world, whose pools of values the questions name.
    """
    world = World(chosen.world)
    probed = world.people("probed", chosen.people)
    known = world.people("background", chosen.background_people)
    strangers = world.people("heldout", HELDOUT_PEOPLE)

    def build(folder: Path) -> dict[str, Any]:
        _write(folder / "source.jsonl", map(_source, probed))
        _write(
            folder / "background.jsonl", _background(known, chosen.background_rewritings, chosen)
        )
        _write(folder / "heldout.jsonl", _background(strangers, HELDOUT_REWRITINGS, chosen))
        for name, people in (("questions", probed), ("control", known)):
            asked = [asdict(question) for question in questions(people, world.pools)]
            _write(folder / f"{name}.jsonl", asked)
        return {"facts": sum(len(person.facts) for person in probed)}

    inputs = {
        name: getattr(chosen, name)
        for name in ("world", "people", "background_people", "background_rewritings")
    }
    report, _ = stages.run_stage(to.output / "texts", inputs, build)
    say(
        "texts",
        f"{len(probed)} people with {report['facts']:,} facts; {len(known)} others as background",
    )
    return world


def rewrite(to: Folders, world: World) -> None:
    """Have the source documents rewritten by the rule behind an OpenAI-compatible server."""
    for count in (1, EXPOSURES):
        folder = to.output / f"rewritten-{count}"
        if not (folder / "report.json").exists():
            with serving(RuleRewriter(pools=world.pools)) as url:
                run_tool(
                    "rephrase_data.py", _rephrase,
                    "--input", to.texts("source"), "--output", folder, "--server", url,
                    "--model", "rule", "--rephrasings", count, "--seed", count, "--concurrency", 8,
                    "--min-sentence-similarity", MIN_SENTENCE_SIMILARITY,
                )  # fmt: skip
        report = json.loads((folder / "report.json").read_text())
        say(
            "rewritings",
            f"{report['rewritings']:,}, {count} a document; "
            f"{report['accept_rate_of_attempts']:.1%} of answers accepted",
        )


def tokenise(to: Folders, chosen: Setting) -> None:
    """Learn one tokenizer from the training text of all arms, and tokenise everything by it."""
    to.tokenizer.parent.mkdir(exist_ok=True)
    files = {name: [to.texts(name)] for name in ("source", "background", "heldout")}
    for count in (1, EXPOSURES):
        name = f"rewritten-{count}"
        files[name] = sorted((to.output / name / "parts").glob("*.jsonl"))
    if not to.tokenizer.exists():
        learnt = [path for name in CORPORA if name != "heldout" for path in files[name]]
        run_tool(
            "preprocess_data.py", preprocess, "train-tokenizer", "--input", *learnt,
            "--vocab-size", chosen.vocab_size, "--output", to.tokenizer,
        )  # fmt: skip
    for name in CORPORA:
        if not to.tokens(name).with_suffix(".json").exists():
            run_tool(
                "preprocess_data.py", preprocess, "--input", *files[name],
                "--output-prefix", to.tokens(name), "--tokenizer-type", "SentencePieceTokenizer",
                "--tokenizer-model", to.tokenizer, "--append-eod", "--workers", 1,
            )  # fmt: skip


def deal_out(to: Folders, chosen: Setting) -> int:
    """Deal the tokens out to the base model and to each arm.

    Returns:
        The steps of every arm.
    """
    sequences = {
        arm: (epochs * to.num_tokens(corpus) - 1) // chosen.seq_length
        for arm, (corpus, epochs) in ARMS.items()
    }
    steps = -(-int(max(sequences.values()) / chosen.facts_share) // chosen.batch)
    for arm, facts in sequences.items():
        folder = to.blend(arm)
        background = steps * chosen.batch - facts
        if not folder.exists():
            manifest = folder.with_suffix(".toml")
            manifest.parent.mkdir(exist_ok=True)
            manifest.write_text(_manifest(to, chosen, arm, facts, background))
            run_tool("blend_data.py", _blend, "emit", manifest, "--output", folder)
        say("blends", f"{arm}: {facts:,} sequences of facts, {background:,} of background")
    return steps


def _rephrase(argv: list[str]) -> list[str]:
    return rephrase.run(rephrase_parser().parse_args(argv))


def _blend(argv: list[str]) -> list[str]:
    def no_recipe(path: Path, scale: str | None) -> Any:
        raise ValueError(f"{path}: the experiment has no recipe")

    return blend.run(blend.parser().parse_args(argv), no_recipe)


def _manifest(to: Folders, chosen: Setting, arm: str, facts: int, background: int) -> str:
    corpus, epochs = ARMS[arm]
    of = 'rephrasing_of = "none"\n' if corpus.startswith("rewritten") else ""
    steps = (facts + background) // chosen.batch
    return f"""rephrasings_per_document = {EXPOSURES}

[[corpora]]
name = "background"
prefix = "{to.tokens("background").resolve()}_text_document"
domain = "background"

[[corpora]]
name = "facts"
prefix = "{to.tokens(corpus).resolve()}_text_document"
domain = "facts"
epochs = {epochs}
{of}
[[stages]]
name = "base"
weights = {{ background = 1 }}
steps = {chosen.base_steps}
seq_length = {chosen.seq_length}
global_batch_size = {chosen.base_batch}

[[stages]]
name = "arm"
weights = {{ facts = {facts}, background = {background} }}
steps = {steps}
seq_length = {chosen.seq_length}
global_batch_size = {chosen.batch}
"""


def _source(person: Person) -> dict[str, str]:
    return {"id": person.name, "text": source_document(person)}


def _background(people: list[Person], each: int, chosen: Setting) -> Iterable[Mapping[str, str]]:
    return ({"text": text} for text in background_documents(people, each, chosen.world))


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
