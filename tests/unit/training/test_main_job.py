"""The main job end to end with the smallest preset: real text in, trained model and figures out."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.data.documents import read_python_library
from megatron_k2.training import from_text, stages
from megatron_k2.training.from_text import main
from megatron_k2.training.job import TRAIN_MODULE, Job, Settings
from megatron_k2.training.launch import last_checkpoint, run_module

TOOL = Path(__file__).resolve().parents[3] / "tools" / "pretrain_from_text.py"
TEXT_BYTES = 230_000  # just above what the job asks for
HELDOUT_BYTES = 8_000


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Return a small JSONL of real text."""
    path, size = tmp_path_factory.mktemp("input") / "text.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        for document in read_python_library():
            if len(document.text) < 6000 and size < TEXT_BYTES:
                size += file.write(json.dumps({"text": document.text}) + "\n")
    return path


def plan_after_a_probe(output: Path, text: Path) -> None:
    """Bring the output folder to where a run stands that was killed after its probe."""
    job = Job(output, Settings(preset="k2-micro", seq_length=128))
    corpus = from_text.corpus_stage(job, text)
    from_text.tokens_stage(job, corpus, 512)
    plan = {
        "seconds_per_iteration": 5.0,  # a progress line each step
        "evaluation_s": 1.0,
        "initial_heldout_loss": 6.2,
        "settings": {**vars(job.settings), "flags": []},
        "tokens": from_text.marker_hash(job.tokens),
        "train_iters": 8,
    }
    stages.write_json(output / "plan.json", plan)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> tuple[Path, list[str], str]:
    """Return the output folder of a finished run, its arguments and what it printed."""
    output = tmp_path_factory.mktemp("job") / "run"
    arguments = ["--input", str(text), "--output", str(output), "--k2-preset", "k2-micro"]
    arguments += ["--prompt", "def main("]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        # Of so little text no more than this is needed to see that the loss falls.
        patch.setattr(from_text, "HELDOUT_BYTES", HELDOUT_BYTES)
        plan_after_a_probe(output, text)
        assert main(arguments) == 0
    return output, arguments, printed.getvalue()


def test_a_run_trains_reports_samples_and_is_finished_the_second_time(trained, capfd):
    output, arguments, first = trained
    assert "[tokens]" in first and "done before" in first
    assert re.search(r"step 8/8  loss \d\.\d+  [\d,]+ tokens/s  max logit \d.*balance \d", first)
    assert "[sample] def main(" in first
    summary = json.loads((output / "summary.json").read_text())
    assert summary["train_tokens"] == 8 * 4 * 128
    assert 3.0 < summary["final_heldout_loss"] < 6.2  # 8 steps have taught it something
    assert summary["bigram_loss"] < summary["unigram_loss"] < 6.2
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events.*"))
    assert last_checkpoint(output / "checkpoints") == 8
    assert re.search(r"\[export\] .*run/hf for transformers; .* \de-0[67] of their spread", first)
    assert json.loads((output / "hf" / "config.json").read_text())["model_type"] == "deepseek_v3"

    assert main(arguments) == 0
    second = capfd.readouterr().out
    assert "all 8 steps are done" in second and "step 8/8" not in second
    assert second.splitlines()[-2] == first.splitlines()[-2]  # the summary


@pytest.mark.evidence  # a torchrun of its own; the export has been compared with the checkpoint
def test_training_from_the_export_begins_at_the_runs_last_heldout_loss(trained, tmp_path):
    output, _, _ = trained
    summary = json.loads((output / "summary.json").read_text())
    job = Job(output, Settings(preset="k2-micro", seq_length=128), vocab_size=512)
    from_export = [*job.probe_arguments(), "--k2-load-hf", str(job.exported)]  # changes no weight
    log = run_module(TRAIN_MODULE, from_export, tmp_path / "from_export.log", 2)
    assert log.validations[-1][1] == pytest.approx(summary["final_heldout_loss"], abs=0.01)  # bf16


def descendants(root: int) -> list[int]:
    """Return a process and all below it, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


@pytest.mark.evidence
@pytest.mark.parametrize("whole_tree", [False, True], ids=["launcher", "all processes"])
def test_a_job_killed_at_random_times_ends_like_one_that_was_not(text, tmp_path, whole_tree):
    """kill -9 five times; needs some minutes."""
    command = [sys.executable, str(TOOL), "--input", str(text), "--k2-preset", "k2-micro"]
    command += ["--train-iters", "60", "--save-interval", "7"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, timeout=900)
    killed = [*command, "--output", str(tmp_path / "killed")]
    generator = random.Random(whole_tree)
    for _ in range(5):
        job = subprocess.Popen(killed)
        time.sleep(generator.uniform(2, 60))
        for pid in descendants(job.pid) if whole_tree else [job.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    subprocess.run(killed, check=True, timeout=900)
    whole, resumed = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")
    )
    for figures in (whole, resumed):
        figures.pop("tokens_per_s")
    assert resumed == whole
