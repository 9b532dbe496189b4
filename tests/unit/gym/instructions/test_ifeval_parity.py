"""Our checks beside IFEval's own code, kind by kind, over gold answers, prose and edge cases.

Needs ``pip install --no-deps lm-eval langdetect nltk immutabledict six``, skipped without. Punkt's
English model is a download of its own: sentences are split by untrained Punkt here.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.faithfulness import Faithfulness
from megatron_k2.gym.instructions.compose import gold
from megatron_k2.gym.instructions.environment import Instructions, JudgedInstructions
from megatron_k2.gym.instructions.rule import Instruction
from megatron_k2.gym.instructions.rules import RULES, holds
from megatron_k2.gym.services import Services
from tests.unit.gym.instructions.test_rules import CASES

pytestmark = pytest.mark.evidence
NAMES = {  # ours -> IFEval's, where the parameters differ
    "frequency": {
        "letter_frequency": "let_frequency",
        "capital_words": "capital_frequency",
    },
    "relation": {"letter_frequency": "let_relation", "capital_words": "capital_relation"},
    "splitter": {"sections": "section_spliter"},
    "marker": {"postscript": "postscript_marker"},
}
RELATIONS = ("at least", "less than")  # IFEval has no others
LANGUAGE_KINDS = ("all_capitals", "all_lowercase", "language")
TELLING_WORDS = 6  # of fewer, langdetect names some language and we name none
GOLDS = 10  # answers to each instruction alone
DRAWS = 3  # of parameters for each kind
LEAST = 0.9  # of the verdicts of a kind that says that it differs
"""Agreement measured once: above; the kinds and numbers are in the README."""


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """IFEval's classes by name, without the rest of lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or importlib.util.find_spec("langdetect") is None:
        pytest.skip("lm-eval, langdetect and nltk are not installed")
    import nltk
    from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer

    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("lm_eval", root), ("lm_eval.tasks", root / "tasks")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    nltk.data.find = lambda *args, **kwargs: None
    nltk.data.load = lambda *args, **kwargs: PunktSentenceTokenizer()
    nltk.download = lambda *args, **kwargs: True
    nltk.word_tokenize = NLTKWordTokenizer().tokenize
    module = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
    found: dict[str, Any] = module.INSTRUCTION_DICT
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Gold answers of two environments, invented prose, and the cases of the rules' tests."""
    env = Instructions(Services())
    found = [env.gold(task)[0].text for task in Instructions.load("train", 200)]
    found += [str(task.metadata["gold"]) for task in JudgedInstructions.load("train", file="")]
    found += sorted({str(task.metadata["context"]) for task in Faithfulness.load("train")})
    found += [text for _, _, follow, fail in CASES for text in (*follow, *fail)]
    return found


def their_check(theirs: dict[str, Any], asked: Instruction) -> Any:
    """IFEval's instruction with our parameters."""
    params = {
        NAMES.get(name, {}).get(asked.kind, name): value for name, value in asked.params.items()
    }
    if asked.kind == "options":
        params = {}
    if asked.kind == "postscript" and params["postscript_marker"] == "P.P.S.":
        params["postscript_marker"] = "P.P.S"
    check = theirs[RULES[asked.kind].ifeval](RULES[asked.kind].ifeval)
    check.build_description(**params)
    return check.check_following


def comparable(asked: Instruction) -> bool:
    """Whether IFEval can express these parameters."""
    if asked.kind == "options":
        return asked.params["options"][0] == "My answer is yes."
    if asked.params.get("language") in ("zh", "nl"):
        return False  # IFEval calls the first zh-cn, and has no Dutch
    return asked.params.get("relation", "at least") in RELATIONS


def test_checks_agree_with_ifevals(theirs: dict[str, Any], texts: list[str]) -> None:
    rng = random.Random(0)
    lines, wrong = [], []
    for kind, rule in RULES.items():
        if not rule.ifeval:
            continue
        asked: list[Instruction] = []
        while len(asked) < DRAWS:
            one = Instruction(kind, rule.draw(rng, "Say hi."))
            if comparable(one):
                asked.append(one)
        pairs = [
            (holds(one, text), bool(check(text)), text)
            for one in asked
            for check in [their_check(theirs, one)]
            for text in [*texts, *(gold([one], seed) for seed in range(GOLDS))]
            if kind not in LANGUAGE_KINDS or len(text.split()) >= TELLING_WORDS
        ]
        different = [text for ours, other, text in pairs if ours != other]
        by_both = sum(ours and other for ours, other, _ in pairs)
        by_either = sum(ours or other for ours, other, _ in pairs)
        share = 1 - len(different) / len(pairs)
        lines.append(f"{kind:22}{share:.3f} {by_both:5} of {by_either:5}  {rule.differs}")
        if share < (LEAST if rule.differs else 1.0):
            wrong.append((kind, share, different[:3]))
    print("\n".join(lines))
    assert wrong == []
