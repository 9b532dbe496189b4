"""A run of stages: the same bytes after kills, budgets and on Ray; refusals name the flag."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.unit.agentic.stages.small_run import published, run

SCRIPTED = ("--model", "scripted")
NUMBERS = 40
SIZE = ("--evolved-tools", str(NUMBERS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run("--out", str(out), *SCRIPTED, *SIZE) == []
    return out


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_units_are_in_order_and_refused_ones_counted(whole: Path) -> None:
    numbers = [one["number"] for one in records(whole / "tools/words.jsonl")]
    lost = {number for number in range(NUMBERS) if number % 31 == 5}
    assert numbers == [number for number in range(NUMBERS) if number not in lost]
    manifest = json.loads((whole / "tools/manifest.json").read_text())
    assert manifest["files"]["words.jsonl"]["lines"] == NUMBERS - len(lost)
    counts = manifest["counts"]
    assert counts["unreadable evolve"] == len(lost)
    assert counts["questions evolve"] == NUMBERS + counts["asked again evolve"]
    assert json.loads((whole / "spent.json").read_text())["tools"][0] == counts["questions evolve"]
    assert not (whole / "work" / "tools").exists()


def test_the_same_command_again_asks_nothing(whole: Path) -> None:
    before = published(whole)
    spent = (whole / "spent.json").read_bytes()
    assert run("--out", str(whole), *SCRIPTED, *SIZE) == []
    assert published(whole) == before
    assert (whole / "spent.json").read_bytes() == spent


def killed_run(arguments: list[str], after_s: float) -> bool:
    """Fork the small run and kill it after a time; return whether it was still under way."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join(after_s)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def check_kills(whole: Path, out: Path, kills: list[float]) -> int:
    arguments = ["--out", str(out), *SCRIPTED, *SIZE, "--timeout-s", "1"]
    killed = sum(killed_run(arguments, after_s) for after_s in kills)
    for journal in sorted((out / "work").glob("*/*/*.jsonl"))[-1:]:
        with journal.open("ab") as file:
            file.write(b'0badc0de {"key": "cut by a ki')
    assert run(*arguments) == []
    assert published(out) == published(whole)
    return killed


def test_a_kill_and_a_torn_line_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert check_kills(whole, tmp_path / "out", [0.4]) == 1


@pytest.mark.evidence
def test_thirty_random_kills_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(10)
    killed = 0
    for number in range(10):
        kills = [draw.uniform(0.0, 0.6) for _ in range(3)]
        killed += check_kills(whole, tmp_path / str(number), kills)
    assert killed >= 20  # the others were too late


def test_a_spent_budget_stops_and_more_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "out"), *SCRIPTED, *SIZE)
    stopped = run(*out, "--max-requests", "20")
    assert len(stopped) == 1 and "--max-requests 20 are spent" in stopped[0]
    assert not (tmp_path / "out" / "tools").exists()
    stopped = run(*out, "--max-tokens", "1")
    assert "--max-tokens 1" in stopped[0]
    assert run(*out) == []
    assert published(tmp_path / "out") == published(whole)
    spent = json.loads((tmp_path / "out" / "spent.json").read_text())["tools"]
    at_once = json.loads((whole / "spent.json").read_text())["tools"]
    assert at_once[0] <= spent[0] <= at_once[0] + 3  # a unit that the budget cut asks again


def test_a_changed_setting_is_refused_and_restart_from_redoes_what_follows(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    changed = ("--out", str(out), *SCRIPTED, *SIZE, "--tasks", "60")
    with pytest.raises(ValueError, match=r"agents was made with --tasks 500, and now it is 60. "
                       r"--restart-from agents redoes it"):  # fmt: skip
        run(*changed)
    with pytest.raises(ValueError, match=r"--restart-from agents"):
        run(*changed, "--restart-from", "tasks")  # that would not redo the stage that changed
    assert published(out) == published(whole)
    kept = (out / "tools" / "manifest.json").stat().st_mtime_ns
    assert run(*changed, "--restart-from", "agents") == []
    assert (out / "tools" / "manifest.json").stat().st_mtime_ns == kept
    assert str(records(out / "agents/sentences.jsonl")[0]["text"]).endswith(" 60")
    assert run(*changed) == []


def test_a_changed_setting_of_a_stage_under_way_is_refused(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"), *SCRIPTED)
    assert run(*out, *SIZE, "--max-requests", "10") != []
    with pytest.raises(ValueError, match="--evolved-tools 40, and now it is 30"):
        run(*out, "--evolved-tools", "30")
    assert run(*out, "--evolved-tools", "30", "--restart-from", "tools") == []
    spent = json.loads((tmp_path / "out" / "spent.json").read_text())
    assert spent["discarded"][0] == 10


def test_a_file_changed_by_hand_is_found(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "tools" / "words.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(ValueError, match=r"words.jsonl was changed after it was published"):
        run("--out", str(out), *SCRIPTED, *SIZE)
    assert run("--out", str(out), *SCRIPTED, *SIZE, "--restart-from", "tools") == []
    assert published(out) == published(whole)


def test_a_stage_that_was_removed_by_hand_is_made_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "agents" / "manifest.json").unlink()
    shutil.rmtree(out / "tasks")
    assert run("--out", str(out), *SCRIPTED, *SIZE) == []
    assert published(out) == published(whole)


def test_another_file_from_outside_is_another_run(tmp_path: Path) -> None:
    dump = tmp_path / "dump.json"
    dump.write_text("[]")
    arguments = ("--out", str(tmp_path / "out"), *SCRIPTED, *SIZE, "--dump", str(dump))
    assert run(*arguments) == []
    dump.write_text("[1]")
    with pytest.raises(ValueError, match="made with another --dump"):
        run(*arguments)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    with pytest.raises(ValueError, match=r"--out .* holds something else than a run"):
        run("--out", str(tmp_path), *SCRIPTED)
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]


def test_a_recording_answers_without_a_model(whole: Path, tmp_path: Path) -> None:
    recorded = ("--out", str(tmp_path / "first"), *SCRIPTED, *SIZE, "--record")
    assert run(*recorded) == []
    answers = tmp_path / "first" / "answers"
    replayed = ("--out", str(tmp_path / "again"), *SIZE, "--replay", str(answers))
    assert run(*replayed) == []
    assert published(tmp_path / "again") == published(whole)
    assert json.loads((tmp_path / "again/spent.json").read_text())["tools"] == [0, 0]
    assert run("--out", str(tmp_path / "again"), *SCRIPTED, *SIZE) == []  # it is the same run
    (answers / "models.json").unlink()
    with pytest.raises(ValueError, match='--model of evolve "scripted", and now it is "replay"'):
        run(*replayed)


def test_a_replay_without_an_answer_stops_and_names_question_stage_and_flag(
    tmp_path: Path,
) -> None:
    assert (
        run("--out", str(tmp_path / "first"), *SCRIPTED, "--evolved-tools", "6", "--record") == []
    )
    replayed = ("--out", str(tmp_path / "again"), "--replay", str(tmp_path / "first" / "answers"))
    words = (
        r"--replay: no answer is recorded to question [0-9a-f]{16} of the role evolve in the stage "
        r'tools, step words, which ends "a word for [67]"; give the flags of the recorded run, or '
        r"--model"
    )
    with pytest.raises(ValueError, match=words):
        run(*replayed, "--evolved-tools", "8")
    assert not (tmp_path / "again" / "tools").exists()
    assert run(*replayed, "--evolved-tools", "8", *SCRIPTED, "--restart-from", "tools") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model: wanted scripted or URL,NAME"),
        (("--model", "gpt"), "--model or --model-for gpt"),
        ((*SCRIPTED, "--model-for", "poet=scripted"), "--model-for poet=scripted"),
        ((*SCRIPTED, "--model-for", "task=scripted", "--model-for", "task=scripted"), "twice"),
        ((*SCRIPTED, "--fault-share", "2"), "--fault-share 2.0"),
        ((*SCRIPTED, "--agents", "0"), "--agents 0: at least 1"),
        ((*SCRIPTED, "--extra-body", "[]"), "--extra-body"),
        (("--replay", "nowhere"), "--replay nowhere: not there"),
        ((*SCRIPTED, "--dump", "nowhere"), "--dump nowhere: No such file"),
        ((*SCRIPTED, "--restart-from", "judge"), "--restart-from judge: is none of --stages"),
        ((*SCRIPTED, "--mcp", "servers.toml"), "--real-servers"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_flag(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run("--out", str(tmp_path / "out"), *arguments)


@pytest.mark.evidence  # Ray takes its time to start
def test_ray_gives_the_same_bytes_and_keeps_budgets(whole: Path, tmp_path: Path) -> None:
    from megatron_k2.compat import optional

    if not optional("ray").usable:
        pytest.skip(f"Ray is not usable: {optional('ray').cause}")
    arguments = ("--out", str(tmp_path / "out"), *SCRIPTED, *SIZE, "--ray")
    try:
        stopped = run(*arguments, "--max-requests", "30")
        assert "--max-requests" in stopped[0]
        assert run(*arguments) == []
    finally:
        importlib.import_module("ray").shutdown()
    assert published(tmp_path / "out") == published(whole)
