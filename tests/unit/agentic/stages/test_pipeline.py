"""The whole scripted pipeline, small: all stages, verified, the same however it is run."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from pathlib import Path

import pytest

from megatron_k2.agentic.stages.command import run
from megatron_k2.agentic.stages.flags import STAGE_NAMES, parser
from tests.unit.agentic.models.answering_app import answering

DUMP = {
    "name": "shelf",
    "category": "software_apps",
    "tools": [
        {
            "name": f"{verb}_book",
            "description": f"The tool to {verb} a book of the shelf, by what is known of it.",
            "inputSchema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in fields},
                "required": list(fields),
            },
        }
        for verb, fields in (
            ("create", ("title", "author")),
            ("get", ("book_id",)),
            ("update", ("book_id", "title")),
            ("delete", ("book_id",)),
        )
    ],
}
SIZE = ("--evolved-tools", "36", "--agents", "4", "--tasks", "16", "--server-share", "0.25")


def synthesize(out: Path, dump: Path, *more: str) -> list[str]:
    """Run the tool."""
    model = () if "--model" in more else ("--model", "scripted")
    arguments = ["--out", str(out), "--dump", str(dump), "--quiet", *SIZE, *model, *more]
    return run(parser().parse_args(["run", *arguments]))


def published(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for stage in STAGE_NAMES
        for path in sorted((out / stage).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "servers.json"
    path.write_text(json.dumps(DUMP))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dump: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    judges = ("--model-for", "judge=scripted", "--model-for", "judge=scripted")
    assert synthesize(out, dump, "--record", *judges) == []
    return out


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_stage_has_its_files_and_they_fit_together(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parser().parse_args(["verify", str(whole)])) == []
    assert "fit together" in capsys.readouterr().out
    sources = [json.loads(line)["source"] for line in (whole / "tools/tools.jsonl").open()]
    assert sources.count("dump") == 4 and 30 <= sources.count("evolved") <= 36
    played = lines(whole / "trajectories/trajectories.jsonl")
    assert played >= 8 and lines(whole / "judge/judgements.jsonl") == played
    rows = [
        whole / f"output/sft_{k}_{s}.jsonl" for k in ("kept", "rejected") for s in ("train", "test")
    ]
    assert sum(map(lines, rows)) <= played and lines(rows[0]) + lines(rows[1]) > 0  # kept ones
    assert json.loads((whole / "judge/agreement.json").read_text())["judges"] == 2
    assert "scripted" in (whole / "report/report.html").read_text()


def test_records_can_be_read_as_text(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, words in (("trajectories", "goal:"), ("agents", '"system"'), ("tools", '"server"')):
        assert run(parser().parse_args(["show", str(whole), kind])) == []
        assert words in capsys.readouterr().out
    with pytest.raises(ValueError, match="--number 999"):
        run(parser().parse_args(["show", str(whole), "tasks", "--number", "999"]))
    assert run(parser().parse_args(["status", str(whole)])) == []
    assert "report        done" in capsys.readouterr().out


def test_a_dry_run_asks_nothing_and_prices_what_is_left(
    tmp_path: Path, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthesize(tmp_path / "out", dump, "--dry-run", "--price-per-million", "1", "2") == []
    said = capsys.readouterr().out
    assert "trajectories  policy" in said and "together" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.evidence
def test_another_concurrency_and_kills_give_the_same_bytes(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    judges = ("--model-for", "judge=scripted", "--model-for", "judge=scripted")
    draw, killed = random.Random(3), 0
    for number in range(12):
        arguments = (tmp_path / "out", dump, "--concurrency", str(1 + number), *judges)
        one = multiprocessing.get_context("fork").Process(target=synthesize, args=arguments)
        one.start()
        one.join(draw.uniform(0.1, 1.5))
        killed += one.is_alive()
        one.kill()
        one.join()
    assert synthesize(tmp_path / "out", dump, *judges) == []
    assert killed >= 3
    assert published(tmp_path / "out") == published(whole)


@pytest.mark.evidence
def test_a_server_gives_the_same_files_as_the_script(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    with answering(whole / "answers") as (url, served):
        model = f"{url},scripted"
        judges = ("--model-for", f"judge={model}", "--model-for", f"judge={model}")
        assert synthesize(tmp_path / "out", dump, "--model", model, *judges) == []
    assert not served["refused"]
    assert published(tmp_path / "out") == published(whole)


@pytest.mark.evidence
def test_a_replay_gives_the_same_records(whole: Path, dump: Path, tmp_path: Path) -> None:
    args = ["--out", str(tmp_path / "out"), "--dump", str(dump), "--quiet", *SIZE]
    assert run(parser().parse_args(["run", *args, "--replay", str(whole / "answers")])) == []
    name = "tasks/tasks.jsonl"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_verify_names_what_was_changed_and_what_fits_no_more(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "report" / "report.html").write_text("mine")
    (out / "judge" / "notes.txt").write_text("mine")
    problems = run(parser().parse_args(["verify", str(out)]))
    assert [one.partition(": ")[2] for one in problems] == [
        "is none of the stage's files",
        "was changed after it was published",
    ]
    shutil.rmtree(out / "tools")
    assert synthesize(out, dump, "--stages", "tools", "--evolved-tools", "0") == []
    problems = run(parser().parse_args(["verify", str(out)]))
    assert any("agents: was made from another tools/tools.jsonl" in one for one in problems)
    assert any("names the tool" in one for one in problems)
