"""The ladder itself: what passes, fails, hangs, is missing, is kept, and what a report tells."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gpu_check import command, report
from megatron_k2.gpu_check.check import (
    Bound,
    CannotRun,
    Check,
    Failed,
    Figure,
    Needs,
    Outcome,
    Place,
    outcome_from_json,
)
from megatron_k2.gpu_check.ladder import Ladder, exit_status
from megatron_k2.gpu_check.machine import describe, redact
from megatron_k2.gpu_check.process import Processes

MACHINE: dict[str, Any] = {
    "device": "cuda", "commit": "c0ffee", "gpus": 1, "capability": [9, 0], "gpu_memory_bytes": 8e10,
}  # fmt: skip
TOP = Bound(1.0, "chosen")


def check(name: str, run: Any, **needs: Any) -> Check:
    return Check(name, 1, "something", Needs(**needs), limit_s=600, run=run)


def ladder(folder: Path, *checks: Check, **changes: Any) -> Ladder:
    place = Place(changes.pop("device", "cuda"), folder, Processes(), say=lambda text: None)
    return Ladder(checks, place, changes.pop("machine", MACHINE), **changes)


def outcomes(made: Ladder) -> list[Outcome]:
    return [outcome for _, outcome, _ in made.climb()]


def raises(error: Exception) -> Any:
    def run(place: Place) -> list[Figure]:
        raise error

    return run


def test_a_figure_outside_its_bound_fails_its_check_by_name(tmp_path: Path) -> None:
    good, bad = Figure("speed", 3.0), Figure("difference", 1.5, "nats", TOP)
    least = Figure("rate", 0.5, "", Bound(1.0, "chosen", at_least=True))
    made = ladder(
        tmp_path,
        check("fine", lambda place: [good]),
        check("off", lambda place: [good, bad, least]),
    )
    first, second = outcomes(made)
    assert (first.status, second.status) == ("passed", "failed")
    assert second.reason == "outside its bound: difference, rate"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_fails_with_and_without_a_bound(
    tmp_path: Path, value: float
) -> None:
    for bound in (None, TOP):
        figure = Figure("loss", value, "", bound)
        one = check("x", lambda place, figure=figure: [figure])
        (found,) = outcomes(ladder(tmp_path, one, again=True))
        assert found.status == "failed"
        assert json.loads((tmp_path / "outcomes" / "x.json").read_text())["status"] == "failed"


def test_errors_of_a_check_are_its_outcome_and_the_next_one_runs(tmp_path: Path) -> None:
    errors = Failed("3 of 4 iterations"), ValueError("x"), CannotRun("needs more memory")
    some = [check(str(index), raises(error)) for index, error in enumerate(errors)]
    found = outcomes(ladder(tmp_path, *some, check("last", lambda place: [])))
    assert [one.status for one in found] == ["failed", "failed", "not run", "passed"]
    assert found[0].reason == "Failed: 3 of 4 iterations"
    assert found[2].reason == "needs more memory"


def test_a_worker_that_hangs_is_ended_with_its_children_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "hanging.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "hanging.log"

    def run(place: Place) -> list[Figure]:
        place.run("hanging", [], log)
        return []

    slow = dataclasses.replace(check("collective", run), limit_s=4)
    (found,) = outcomes(ladder(tmp_path, slow))
    assert found.status == "failed"
    hint = "(a slower machine: --limit-factor 3)"
    assert found.reason.startswith(f"collective hung: limit 4 s {hint}; hanging hung")
    for child in log.read_text().split():  # none if the machine took 4 s to start Python
        command_line = Path("/proc", child, "cmdline")
        assert not command_line.exists() or not command_line.read_bytes()


def test_a_worker_that_fails_shows_its_last_lines_without_names_or_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = f"no NCCL on node17 at 10.1.2.3:29500, {tmp_path}/x"
    (tmp_path / "failing.py").write_text(f"raise SystemExit({said!r})\n")

    def run(place: Place) -> list[Figure]:
        place.run("failing", [], tmp_path / "failing.log")
        return []

    (found,) = outcomes(ladder(tmp_path, check("nccl", run)))
    assert found.status == "failed" and "no NCCL on HOST at ADDRESS, OUTPUT/x" in found.reason


@pytest.mark.parametrize(
    "needs, machine, reason",
    [
        (dict(gpus=8), {}, "needs 8 GPUs, found 1"),
        (dict(gpus=1), {"gpus": 0}, "needs 1 GPU, found 0"),
        (dict(capability=(10, 0)), {}, "needs compute capability 10.0, found 9.0"),
        (dict(distributions=("deep_ep",)), {}, "needs deep_ep: it is not installed"),
        (dict(packages=("transformer_engine",)), {}, "needs transformer-engine: "),
        (dict(disk_bytes=1e18), {}, "needs 1000000000 GB of disk, found "),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_run(
    tmp_path: Path, needs: dict[str, Any], machine: dict[str, Any], reason: str
) -> None:
    one = check("x", raises(AssertionError("it ran")), **needs)
    (found,) = outcomes(ladder(tmp_path, one, machine=MACHINE | machine))
    assert found.status == "not run" and found.reason.startswith(reason)


def test_a_cpu_rehearses_what_can_be_and_says_what_cannot(tmp_path: Path) -> None:
    some = check("a", lambda place: [], on_cpu=True), check("b", lambda place: [], gpus=8)
    found = outcomes(ladder(tmp_path, *some, device="cpu", machine={"device": "cpu"}))
    assert [one.status for one in found] == ["passed", "not run"]
    assert found[1].reason == "needs 8 GPUs; this is --device cpu"


def test_the_third_rung_counts_the_gpus_of_its_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(check("cluster", lambda place: [], gpus=256), rung=3)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    (found,) = outcomes(ladder(tmp_path, one))
    assert found.reason == "needs 256 GPUs of a Slurm allocation, found 0"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "32")
    assert outcomes(ladder(tmp_path, one))[0].status == "passed"


def test_done_checks_are_kept_others_are_tried_and_again_repeats(tmp_path: Path) -> None:
    ran: list[str] = []

    def noted(name: str, error: Exception | None = None) -> Check:
        def run(place: Place) -> list[Figure]:
            ran.append(name)
            if error:
                raise error
            return [Figure("x", 1.0, "s", TOP)]

        return check(name, run)

    some = (
        noted("passes"), noted("fails", Failed("x")), noted("cannot", CannotRun("y"))
    )  # fmt: skip
    first = outcomes(ladder(tmp_path, *some))
    ran.clear()
    second = list(ladder(tmp_path, *some).climb())
    assert ran == ["cannot"]
    assert [kept for _, _, kept in second] == [True, True, False]
    assert second[0][1].figures == first[0].figures
    ran.clear()
    outcomes(ladder(tmp_path, *some, again=True))
    assert ran == ["passes", "fails", "cannot"]


def test_another_machines_outcomes_are_put_aside(tmp_path: Path) -> None:
    one = check("x", lambda place: [])
    outcomes(ladder(tmp_path, one))
    (_, _, kept), = ladder(tmp_path, one, machine=MACHINE | {"driver": "2"}).climb()  # fmt: skip
    assert not kept
    assert len(list(tmp_path.glob("earlier-*/x.json"))) == 1


def test_the_exit_status_says_failed_passed_or_nothing_ran() -> None:
    made = {status: Outcome("x", status) for status in ("passed", "failed", "not run")}  # type: ignore[arg-type]
    assert exit_status([made["passed"], made["not run"]]) == 0
    assert exit_status([made["passed"], made["failed"]]) == 1
    assert exit_status([made["not run"]]) == 3


def test_the_report_has_every_figure_with_its_bound_and_why(tmp_path: Path) -> None:
    one = check("x", lambda place: [])
    figures = [Figure("difference", 1.5, "nats", TOP), Figure("speed", 7.0, "tokens/s")]
    outcome = Outcome("x", "failed", figures, "outside its bound: difference", 3.0)
    path = report.write_report(tmp_path, MACHINE, [(one, outcome)])
    text = path.read_text()
    assert "| difference | 1.5 nats **outside** | <= 1 | chosen |" in text
    assert "0 passed, 1 failed, 0 not run" in text and "c0ffee" in text
    assert report.REHEARSAL not in text
    stored = json.loads((tmp_path / "report.json").read_text())
    assert outcome_from_json(stored["checks"][0]) == outcome
    cpu = report.markdown("today", {**MACHINE, "device": "cpu"}, [(one, outcome)])
    assert report.REHEARSAL in cpu


def test_a_machines_description_names_no_host_user_or_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node17.cluster")
    monkeypatch.setenv("LOGNAME", "alice")
    text = json.dumps(describe("cpu"))
    assert not any(name in text for name in ("node17", "alice", str(Path.home()), str(Path.cwd())))
    said = f"alice@node17:{Path.home()}/x and node17.cluster, not nodes or node170"
    assert redact(said) == "USER@HOST:HOME/x and HOST, not nodes or node170"


def test_without_a_gpu_nothing_is_run_and_the_command_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names = ["golden-fp32", "te-bf16", "memory"]
    assert command.main(["--only", *names, "--out", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "[te-bf16] not run: needs 1 GPU, found 0" in said
    assert "0 passed, 0 failed, 3 not run" in (tmp_path / "report.md").read_text()


def test_list_names_every_check_and_wrong_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {one.name}: {one.proves}" in listed for one in command.CHECKS)
    assert command.main(["--only", "nccl"]) == 2
    assert capsys.readouterr().err.startswith("error: --only nccl: checks are golden-fp32, ")
    assert command.main(["--limit-factor", "0"]) == 2
    assert "--limit-factor 0.0 must be above 0" in capsys.readouterr().err


def test_names_of_checks_are_unique_and_every_rung_has_some() -> None:
    names = [one.name for one in command.CHECKS]
    assert len(names) == len(set(names))
    assert {one.rung for one in command.CHECKS} == {1, 2, 3}
