"""tools/blend_data.py: what Megatron then reads, token by token, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_k2.data.blend.allotment import apportioned
from megatron_k2.data.blend.command import parser, run
from megatron_k2.data.blend.manifest import Budget
from megatron_k2.training.recipes.recipe import read_recipe
from tests.unit.data.blend.corpora import labels_read, write_corpus

SEQUENCE = 16
RECIPE = Path(__file__).resolve().parents[4] / "examples" / "kimi_k2_1t" / "recipe.toml"
STAGES = ("stable", "decay", "annealing", "long-context")  # of RECIPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    first = write_corpus(root / "web", 0, 300)
    write_corpus(root / "code", first, 90, seed=1)
    return root


def no_recipe(path: Path, scale: str | None) -> list[Budget]:
    raise AssertionError(path)


def write_manifest(folder: Path, stages: str, epochs: int = 1, more: str = "") -> Path:
    path = folder / "blend.toml"
    path.write_text(
        f"""{more}
        [[corpora]]
        name = "web"
        prefix = "{folder}/web"
        domain = "Web"
        [[corpora]]
        name = "code"
        prefix = "{folder}/code"
        epochs = {epochs}
        {stages}"""
    )
    return path


def stage(name: str, rest: str, batch: int = 4, length: int = SEQUENCE) -> str:
    return f"""
        [[stages]]
        name = "{name}"
        seq_length = {length}
        global_batch_size = {batch}
        {rest}"""


def blend(*words: Any) -> list[str]:
    return run(parser().parse_args([str(word) for word in words]), no_recipe)


def read_stages(
    output: Path, stages: dict[str, tuple[int, int]], cache: Path
) -> tuple[Counter[int], list[list[int]]]:
    """Return how often each label is read by Megatron, and samples by stage and dataset."""
    seen: Counter[int] = Counter()
    counts = []
    for name, (num_samples, length) in stages.items():
        words = (output / f"{name}.data-args.txt").read_text().split()
        labels, by_dataset = labels_read(words, num_samples, length, cache)
        assert by_dataset == [int(weight) for weight in words[::2]]
        seen.update(labels)
        counts.append(by_dataset)
    return seen, counts


def test_megatron_reads_no_token_twice_in_all_stages(folder: Path, tmp_path: Path) -> None:
    path = write_manifest(
        folder,
        stage("first", "steps = 40\n        weights = { web = 0.7, code = 0.3 }")
        + stage("second", "tokens = 3500\n        weights = { web = 2, code = 1 }")
        + stage("long", "epochs = { web = 0.2, code = 0.15 }", batch=2, length=48),
    )
    assert blend("emit", path, "--output", tmp_path / "out") == []
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    stages = {
        name: (figures[name]["tokens_read"] // length, length)
        for name, length in (("first", SEQUENCE), ("second", SEQUENCE), ("long", 48))
    }
    seen, counts = read_stages(tmp_path / "out", stages, tmp_path / "cache")
    assert max(seen.values()) == 1
    assert seen.total() == sum(number * length for number, length in stages.values())
    assert counts[0] == [112, 48] and sum(counts[1]) == 4 * round(3500 / 64)
    web = int(np.fromfile(folder / "web.bin", dtype=np.int32).size)
    assert counts[2][0] == pytest.approx(0.2 * web / 48, abs=2)


def test_megatron_alone_reads_the_same_tokens_in_each_stage(folder: Path, tmp_path: Path) -> None:
    """Why stages get documents of their own; if this fails, upstream has learnt to go on."""
    words = ["1", f"{folder}/web", "1", f"{folder}/code"]
    first, _ = labels_read(words, 100, SEQUENCE, tmp_path)
    second, _ = labels_read(words, 60, SEQUENCE, tmp_path)
    assert set(second) < set(first)


def test_epochs_that_are_asked_for_come_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    num_code = np.fromfile(folder / "code.bin", dtype=np.int32).size
    steps = int(1.5 * num_code / SEQUENCE / 2 / 4)
    text = "".join(
        stage(name, f"steps = {steps}\n        weights = {{ web = 1, code = 3 }}")
        for name in ("first", "second")
    )
    (problem,) = blend("check", write_manifest(folder, text))
    assert problem.startswith("stage second: corpus code: ") and "set epochs = 2" in problem
    assert f"left of 1 x {num_code:,}" in problem
    path = write_manifest(folder, text, epochs=2)
    assert blend("emit", path, "--output", tmp_path / "out") == []
    stages = dict.fromkeys(("first", "second"), (steps * 4, SEQUENCE))
    seen, _ = read_stages(tmp_path / "out", stages, tmp_path / "cache")
    ids = np.fromfile(folder / "code.bin", dtype=np.int32).tolist()
    assert max(seen[one] for one in ids) == 2
    assert sum(seen[one] == 0 for one in ids) < 200  # cut at documents; the labels' first tokens
    report = json.loads((tmp_path / "out" / "report.json").read_text())["corpora"]["code"]
    assert report["most_times_a_document"] == 2 and 1 < report["epochs_seen"] < 1.3


def test_short_stages_are_refused_or_read_once(folder: Path, tmp_path: Path) -> None:
    """Upstream asks for a little more than is read, and may shuffle a second epoch among it."""
    refused = []
    for steps in range(1, 5):
        text = stage("one", f"steps = {steps}\n        weights = {{ code = 1 }}", batch=1)
        output = tmp_path / str(steps)
        if blend("emit", write_manifest(folder, text), "--output", output):
            refused.append(steps)
            continue
        seen, _ = read_stages(output, {"one": (steps, SEQUENCE)}, tmp_path / f"cache{steps}")
        assert max(seen.values()) == 1, steps
    assert refused and refused == list(range(1, refused[-1] + 1)), refused
    assert refused[-1] < 4


def test_a_recipe_takes_the_blend_as_a_scale(folder: Path, tmp_path: Path) -> None:
    text = "".join(stage(name, "steps = 10\n        weights = { web = 1 }") for name in STAGES)
    assert blend("emit", write_manifest(folder, text), "--output", tmp_path / "out") == []
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.read_text() + (tmp_path / "out" / "recipe-scale.toml").read_text())
    for found in read_recipe(recipe, "blend").stages:
        ((weight, prefix),) = found.data
        assert weight == 40 and Path(f"{prefix}.bin").samefile(folder / "web.bin")
        assert prefix.startswith(str(tmp_path / "out" / "stages" / found.name / "web-"))
        assert found.arguments["split"] == "100,0,0"


def test_budgets_come_from_a_recipe_and_what_they_lack_is_named(folder: Path) -> None:
    def budgets(path: Path, scale: str | None) -> list[Budget]:
        stages = read_recipe(path, scale).stages
        return [Budget(s.name, s.steps, s.seq_length, s.global_batch_size) for s in stages]

    text = "".join(
        f'\n[[stages]]\nname = "{name}"\nweights = {{ web = 0.6, code = 0.4 }}' for name in STAGES
    )
    path = write_manifest(folder, text, more=f'recipe = "{RECIPE}"')
    problems = run(parser().parse_args(["check", str(path)]), budgets)
    assert len(problems) == 2 * len(STAGES)
    samples = round(10e12 / 4096 / 16384) * 16384
    assert f"{apportioned(samples, [Fraction(6), Fraction(4)])[0]:,} sequences" in problems[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weights = { web = 1 }", "weights = { wob = 1 }"), "stage one: weights: wob is none of"),
        (("weights = { web = 1 }", "weights = { web = 0 }"), "web = 0 must be a number above 0"),
        (("weights = { web = 1 }", "tokens = 5\nweights = { web = 1 }"), "one of tokens and steps"),
        (("steps = 2", "tokens = 9"), "stage one: tokens = 9 are less than half a step"),
        (('domain = "Web"', "domain = 3"), "corpus web: domain = 3 must be a text"),
        (("epochs = 1", "epochs = 0"), "corpus code: epochs = 0 must be a whole number"),
        (("epochs = 1", "epoch = 1"), "corpus code has unknown keys epoch; allowed"),
        (("epochs = 1", 'rephrasing_of = "wob"'), "rephrasing_of wob must be one of web"),
        (("epochs = 1", 'rephrasing_of = "web"'), "corpus code: rephrasing_of web: there are no"),
        (("/web", "/wob"), "corpus web: prefix"),
        (('domain = "Web"', 'side_files = "wob"'), "corpus web: side_files wob: no wob.json"),
    ],
)
def test_errors_name_corpus_or_stage_and_field(
    folder: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = write_manifest(folder, stage("one", "steps = 2\n        weights = { web = 1 }"))
    text = path.read_text()
    assert change[0] in text
    path = tmp_path / "blend.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        blend("check", path)


def test_few_sequences_and_one_corpus_twice_are_refused(folder: Path, tmp_path: Path) -> None:
    text = stage("one", "steps = 30\n        weights = { web = 119, code = 1 }")
    (problem,) = blend("check", write_manifest(folder, text))
    assert "stage one: corpus code: 1 sequences are so few" in problem
    path = write_manifest(folder, stage("one", "steps = 30\n        weights = { web = 1 }"))
    path.write_text(path.read_text().replace(f"{folder}/code", f"{folder}/./web"))
    (problem,) = blend("emit", path, "--output", tmp_path / "out")
    assert problem.startswith("corpus code: prefix") and problem.endswith("is that of corpus web")
    assert not (tmp_path / "out").exists()


def test_apportioned_numbers_sum_and_never_exceed_their_part_by_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        shares = [Fraction(int(n)) for n in generator.integers(1, 1000, generator.integers(1, 9))]
        total = int(generator.integers(1, 10**7))
        counts = apportioned(total, shares)
        assert sum(counts) == total
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - total * share / sum(shares)) < 1
