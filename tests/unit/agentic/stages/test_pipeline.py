"""The whole scripted pipeline, small: all stages, verified, the same however it is run."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from pathlib import Path

import pytest

from megatron_k2.agentic.stages.command import run
from megatron_k2.agentic.stages.flags import parser
from tests.unit.agentic.models.answering_app import answering
from tests.unit.agentic.stages.whole_run import DUMP, SIZE, published, synthesize


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "servers.json"
    path.write_text(json.dumps(DUMP))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dump: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert synthesize(out, dump, "--record") == []
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
    agreed = json.loads((whole / "judge/agreement.json").read_text())  # measured without a flag
    assert agreed["judges"] == 2 and agreed["pairs"] > 0 and agreed["agree"] is not None
    assert "scripted" in (whole / "report/report.html").read_text()


def test_records_can_be_read_as_text(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, words in (("trajectories", "goal:"), ("agents", '"system"'), ("tools", '"server"')):
        assert run(parser().parse_args(["show", str(whole), kind])) == []
        assert words in capsys.readouterr().out
    assert run(parser().parse_args(["show", str(whole), "judgements", "--number", "1"])) == []
    judged = json.loads((whole / "judge/judgements.jsonl").read_text().splitlines()[1])
    said = capsys.readouterr().out
    assert f"of trajectory {judged['trajectory']}, judged by " in said
    assert f"verdict: {'passes' if judged['passes'] else 'fails'}" in said
    for name in judged["scores"]:
        assert f"{judged['by'].get(name, 'nobody'):<8} {name}" in said
    places = [
        number
        for number, line in enumerate((whole / "judge/judgements.jsonl").open())
        if json.loads(line)["quotes"]
    ]
    for kind in ("judgements", "trajectories"):  # what a judge quoted is shown with both
        assert (
            run(parser().parse_args(["show", str(whole), kind, "--number", str(places[0])])) == []
        )
        assert 'evidence: "' in capsys.readouterr().out
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
    lines = said.splitlines()
    assert all("~" in one for one in lines[1:8])  # no figure without its mark and its basis
    assert "36 evolved tools x 0.36, 1,350 + 850 tokens each" in lines[1]
    assert "16 trajectories x 0.7 x 2 judges" in lines[6] and "~ marks estimates" in lines[8]
    assert not (tmp_path / "out").exists()


@pytest.mark.evidence
def test_another_concurrency_and_kills_give_the_same_bytes(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    draw, killed = random.Random(3), 0
    for number in range(12):
        arguments = (tmp_path / "out", dump, "--concurrency", str(1 + number))
        one = multiprocessing.get_context("fork").Process(target=synthesize, args=arguments)
        one.start()
        one.join(draw.uniform(0.05, 0.2) * (1 + number))  # a fast machine is done in a second
        killed += one.is_alive()
        one.kill()
        one.join()
    assert synthesize(tmp_path / "out", dump) == []
    assert killed >= 3
    assert published(tmp_path / "out") == published(whole)


@pytest.mark.evidence
def test_a_server_gives_the_same_files_as_the_script(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    right = ("--scripted-mistakes", "0")  # a server does not say what it got wrong on purpose
    assert synthesize(tmp_path / "script", dump, "--record", *right) == []
    with answering(tmp_path / "script" / "answers") as (url, served):
        model = ("--model", f"{url},scripted")
        assert synthesize(tmp_path / "out", dump, *model, *right) == []
    assert not served["refused"]
    assert published(tmp_path / "out") == published(tmp_path / "script")


@pytest.mark.parametrize("model", [(), ("--model", "http://127.0.0.1:9/v1,another")])
def test_a_replay_gives_the_same_bytes_whatever_the_model_is(
    whole: Path, dump: Path, tmp_path: Path, model: tuple[str, ...]
) -> None:
    args = ["--out", str(tmp_path / "out"), "--dump", str(dump), "--quiet", *SIZE, *model]
    assert run(parser().parse_args(["run", *args, "--replay", str(whole / "answers")])) == []
    found, wanted = published(tmp_path / "out"), published(whole)
    assert any(b'"planted": "wrong_' in one for one in wanted.values())
    if model:  # it is named as what would have been asked, and nowhere else
        named = [name for name in wanted if found[name] != wanted[name]]
        assert {Path(name).name for name in named} == {"manifest.json", "report.html"}
        found = {name: text for name, text in found.items() if name not in named}
        wanted = {name: text for name, text in wanted.items() if name not in named}
    assert found == wanted


def test_verify_names_what_was_changed_and_what_fits_no_more(
    whole: Path, dump: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "report" / "report.html").write_text("mine")
    (out / "judge" / "notes.txt").write_text("mine")
    tampered = out / "tasks" / "tasks.jsonl"
    tampered.write_bytes(tampered.read_bytes().replace(b"goal", b"gaol", 1))
    problems = run(parser().parse_args(["verify", str(out)]))
    number = (whole / "report/report.html").stat().st_size
    assert [one.removeprefix(f"{out}/") for one in problems] == [
        "tasks/tasks.jsonl was changed after it was published: as long as then, with other content",
        "judge/notes.txt is none of the stage's files",
        f"report/report.html was changed after it was published: {number} bytes then, 4 bytes now",
    ]
    with pytest.raises(ValueError) as refused:
        synthesize(out, dump)
    assert str(refused.value) == (
        f"--out {out}: the stage tasks is not as it was published: {problems[0]}. "
        "--restart-from tasks redoes it and what follows; or give another --out"
    )
    for text in ("{", "[]", '{"stage": "judge", "settings": [], "inputs": {}, "files": {}}'):
        (out / "judge" / "manifest.json").write_text(text)
        problems = run(parser().parse_args(["verify", str(out)]))
        said = f"{out}/judge/manifest.json is damaged; run with --restart-from judge makes the "
        assert sum(one.startswith(said) for one in problems) == 1
    shutil.copy(whole / "judge" / "manifest.json", out / "judge" / "manifest.json")
    with (out / "tools" / "tools.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"tools.jsonl is no JSON \(.*verify says what changed"):
        run(
            parser().parse_args(
                ["show", str(out), "tools", "--number", str(lines(whole / "tools/tools.jsonl"))]
            )
        )
    shutil.rmtree(out / "tools")
    assert synthesize(out, dump, "--stages", "tools", "--evolved-tools", "0") == []
    problems = run(parser().parse_args(["verify", str(out)]))
    assert "the stage agents was made from another tools/tools.jsonl than is there" in problems
    assert any("names the tool" in one for one in problems)
