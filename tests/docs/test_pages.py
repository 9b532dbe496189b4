"""Every command of the documents runs, or says in words why not; its flags exist in any case.

Pages of docs/ are told word for word in one folder, as a reader would who begins at the top, those
that go on from another one after it. `make test` tells what is cheap, `make evidence` everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import Command, commands_of
from tests.docs.layouts import rows
from tests.docs.pages import DOCS, ROOT, documents, is_command, read_page
from tests.docs.story import Story

# One that changes the folder's copies of the checkout comes last.
PAGES = sorted(DOCS.glob("*.md"), key=lambda path: (bool(read_page(path).copies), path))
OTHERS = [path for path in documents() if path not in PAGES]
PLANTED = {
    "a flag of a tool": ".venv/bin/python tools/gym.py validate --alll",
    "a flag handed on to Megatron": ".venv/bin/python tools/pretrain_from_text.py --learnrate 1",
    "a subcommand": ".venv/bin/python tools/convert_checkpoint.py to-megatrons a b",
    "a flag of Megatron": "torchrun -m megatron_k2.training.pretrain --micro-batchsize 1 ...",
    "a choice": "torchrun -m megatron_k2.training.sft --optimizer sgdd ...",
    "a layout": "torchrun --nproc-per-node 8 -m megatron_k2.training.pretrain --k2-preset k2-micro "
    "--mock-data --tensor-model-parallel-size 3 --micro-batch-size 1 --train-iters 1 --lr 1",
    "a script": "examples/k2_nano/slf.sh",
    "a target": "make trian",
    "a test": "pytest tests/unit/nothing",
    "a program": "moo",
}


@pytest.fixture(scope="module")
def problems() -> list[list[str]]:
    """What the real parsers say of all commands, and of planted ones: (place, problem) each."""
    asked: list[tuple[str, Command]] = []
    written: list[str] = []
    for path in documents():
        page = read_page(path)
        written += [block.name for block in page.blocks if block.kind == "file"]
        for block in page.commands:
            asked += [(block.place, command) for command in commands_of(block.text)]
    asked += [(f"planted {name}", commands_of(text)[0]) for name, text in PLANTED.items()]
    commands = [(place, one.words, one.is_whole) for place, one in asked]
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/docs/flags.py"], cwd=ROOT, text=True,
        input=json.dumps({"commands": commands, "written": written}), capture_output=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-2000:]
    found: list[list[str]] = json.loads(said.stdout)
    return found


def test_every_flag_of_every_command_exists(problems: list[list[str]]) -> None:
    assert not [one for one in problems if not one[0].startswith("planted")]


@pytest.mark.parametrize("name", PLANTED)
def test_a_command_that_cannot_be_is_found(problems: list[list[str]], name: str) -> None:
    assert f"planted {name}" in [place for place, _ in problems]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_commands_is_run_or_says_why_not(path: Path) -> None:
    for block in read_page(path).commands:
        if block.not_run:
            continue
        assert path in PAGES or block.is_evidence, f"{block.place}: neither run nor said why not"
        assert all(one.is_whole for one in commands_of(block.text)), f"{block.place}: an ellipsis"


def test_pages_leave_nothing_out_and_name_the_language_of_every_block() -> None:
    for path in PAGES:
        for block in read_page(path).blocks:
            assert block.language, f"{block.place}: a fence names no language"
        for block in read_page(path).commands:
            assert all(one.is_whole for one in commands_of(block.text)), block.place


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    assert [path.name for path in PAGES if f"]({path.name})" not in index] == ["README.md"]


def test_the_card_has_the_layouts_of_the_tests() -> None:
    card = (DOCS / "model-card.md").read_text().splitlines()
    first = card.index("|---|---|---|---|---|") + 1
    assert card[first : card.index("", first)] == rows()


def test_a_block_of_commands_is_known_by_its_language_or_its_lines() -> None:
    assert is_command("bash", "anything") and is_command("", "X=1 make test")
    assert not is_command("text", "make test") and not is_command("", "  step 1/2  loss 8.4")


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One folder for the cheap blocks of all pages."""
    return Story(tmp_path_factory.mktemp("cheap"), evidence=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_cheap_of_a_page_runs(path: Path, cheap: Story) -> None:
    cheap.tell(path)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One folder for all pages."""
    return Story(tmp_path_factory.mktemp("story"), evidence=True)


@pytest.mark.evidence
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_runs(path: Path, story: Story) -> None:
    told = len(story.seconds)
    story.tell(path)
    print(*(f"{seconds:6.1f} s  {place}" for place, seconds in story.seconds[told:]), sep="\n")


@pytest.mark.evidence
@pytest.mark.parametrize(
    "path",
    [path for path in OTHERS if any(not one.not_run for one in read_page(path).commands)],
    ids=lambda path: str(path.parent.relative_to(ROOT)),
)
def test_readme_of_a_room_runs(path: Path, tmp_path: Path) -> None:
    Story(tmp_path, evidence=True).tell(path)
