"""Sweeps: what is a run, what is done once, what a kill leaves, and one run of the real trainer."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.data.documents import Document, read_python_library
from megatron_k2.training.sweeps.command import main
from megatron_k2.training.sweeps.data import SweepData, load_data, pieces, prepare_data
from megatron_k2.training.sweeps.grid import Cell, Sweep, expand, parse_axes
from megatron_k2.training.sweeps.report import summarise, table
from megatron_k2.training.sweeps.run import load_results, run_all, run_cell
from tests.unit.training.sweep_fakes import DATA, DOMAINS, fake_sweep, grid, starts

ROOT = Path(__file__).resolve().parents[3]


def test_a_grid_is_every_setting_of_the_first_seed_first():
    axes = parse_axes([["lr", "1e-3", "2e-3"], ["clip", "on=", "off=--no-k2-qk-clip --x 'a b'"]])
    cells = expand(axes, [1, 2], ["--lr", "9"])
    assert [cell.seed for cell in cells] == [1] * 4 + [2] * 4
    assert cells[1].settings == (("lr", "1e-3"), ("clip", "off"))
    assert cells[1].flags == ("--lr", "9", "--lr", "1e-3", "--no-k2-qk-clip", "--x", "a b")
    assert cells[0].flags == ("--lr", "9", "--lr", "1e-3")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([["lr"]], "--vary lr: no values"),
        ([["lr", "1"], ["--lr", "2"]], "--vary lr: given twice"),
        ([["lr", "1", "1"]], "--vary lr: 1 given twice"),
    ],
)
def test_axes_that_name_no_grid_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        parse_axes(axes)


def test_a_run_is_its_flags_its_seed_and_its_text_and_nothing_else(tmp_path):
    sweep, (cell, other) = Sweep(tmp_path, DATA), grid("1")
    same = Cell(cell.settings, cell.flags, cell.seed, {"note": 1})
    assert sweep.folder(same) == sweep.folder(cell) != sweep.folder(other)
    assert Sweep(tmp_path, DATA, 8, "srun").folder(cell) == sweep.folder(cell)
    text = SweepData(DATA.train, DATA.tokenizer_flags, DOMAINS, "4567")
    assert Sweep(tmp_path, text).folder(cell) != sweep.folder(cell)
    flags = Cell(cell.settings, (*cell.flags, "--x"), cell.seed)
    assert sweep.folder(flags) != sweep.folder(cell)


def test_commands_of_one_process_of_several_and_of_a_cluster(tmp_path):
    cell = grid("1")[0]
    one = Sweep(tmp_path, DATA).command(cell)
    assert one[0] == "env" and "WORLD_SIZE=1" in one and "torch.distributed.run" not in one
    two = Sweep(tmp_path, DATA, processes=2).command(cell)
    assert two[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher = "srun -N 2 torchrun --rdzv-endpoint node0:{port}"
    far = Sweep(tmp_path, DATA, 16, launcher).command(cell)
    assert far[:4] == ["srun", "-N", "2", "torchrun"] and far[5].startswith("node0:")
    assert far[6:8] == ["-m", "megatron_k2.training.pretrain"]
    assert far[far.index("--eval-global-batch-size") + 1] == "16"
    split = Cell((), (*cell.flags, "--tensor-model-parallel-size", "3"), 1)
    with pytest.raises(ValueError, match=r"--processes 16 must be divisible by 3"):
        Sweep(tmp_path, DATA, 16, launcher).command(split)


def test_results_hold_both_units_by_domain_and_finished_runs_are_not_repeated(tmp_path):
    sweep, said = fake_sweep(tmp_path), []
    results, failed = run_all(sweep, grid("0", "1"), said.append)
    assert not failed and [r["seed"] for r in results] == [1, 1, 2, 2]
    assert results[1]["nats_per_token"] == {"code": 1.0, "prose": 3.0}
    bits = results[1]["bits_per_byte"]
    assert bits["code"] == pytest.approx(1000 / 4000 / math.log(2))
    assert bits["prose"] == pytest.approx(3 * 500 / 1000 / math.log(2))
    assert bits["all"] == pytest.approx((1000 + 1500) / 5000 / math.log(2))
    assert starts(tmp_path) == ["10", "11", "20", "21"]
    assert "4/4 lr=1 seed=2" in said[-1]
    wider, _ = run_all(sweep, grid("0", "1", "2", seeds=(1, 2, 3)), said.append)
    assert len(wider) == 9 and len(starts(tmp_path)) == 9
    assert len(load_results(tmp_path / "out")) == 9


def test_a_failed_run_is_told_does_not_stop_the_others_and_is_tried_again(tmp_path):
    sweep = fake_sweep(tmp_path)
    results, failed = run_all(sweep, grid("9", "1", seeds=(1,)), lambda line: None)
    assert len(results) == 1 and len(failed) == 1
    assert "lr=9 seed=1" in failed[0] and "out of memory" in failed[0] and "log.txt" in failed[0]
    (tmp_path / "mended").touch()
    results, failed = run_all(sweep, grid("9", "1", seeds=(1,)), lambda line: None)
    assert len(results) == 2 and not failed and starts(tmp_path) == ["11", "19", "19"]


def test_refused_flags_stop_the_sweep_and_name_the_run(tmp_path):
    with pytest.raises(ValueError, match="run lr=bad seed=1: --lr bad is no number"):
        run_all(fake_sweep(tmp_path), grid("bad"), lambda line: None)


def test_a_run_that_evaluated_nothing_is_no_result(tmp_path):
    script = tmp_path / "silent.py"
    script.write_text("print('trained')")
    sweep = Sweep(tmp_path, DATA, launcher=shlex.join([sys.executable, str(script)]))
    with pytest.raises(RuntimeError, match="no held-out loss of every domain"):
        run_cell(sweep, grid("1")[0])
    assert not (sweep.folder(grid("1")[0]) / "result.json").exists()


def sweep_process(folder: Path, pause: str) -> subprocess.Popen:
    """Start the fake grid of 4 runs as a process of its own."""
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_k2.training.sweeps.run import run_all\n"
        "from tests.unit.training.sweep_fakes import fake_sweep, grid\n"
        "run_all(fake_sweep(Path(sys.argv[1])), grid('0', '1', pause=sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), pause], env=environment)


def test_after_kill_9_the_unfinished_run_starts_again_and_no_other(tmp_path):
    process = sweep_process(tmp_path, "1.0")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() or len(starts(tmp_path)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [result["settings"]["lr"] for result in load_results(tmp_path / "out")]
    assert done == ["0"]
    results, failed = run_all(fake_sweep(tmp_path), grid("0", "1", pause="1.0"), print)
    assert len(results) == 4 and not failed
    assert starts(tmp_path) == ["10", "11", "11", "20", "21"]


def test_two_processes_share_the_runs_and_both_see_all_results(tmp_path):
    fake_sweep(tmp_path)
    processes = [sweep_process(tmp_path, "0.3") for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert starts(tmp_path) == ["10", "11", "20", "21"]
    assert len(load_results(tmp_path / "out")) == 4


def test_tables_compare_settings_seed_by_seed_and_by_domain(tmp_path):
    results, _ = run_all(fake_sweep(tmp_path), grid("0", "1", seeds=(1, 2, 3)), lambda line: None)
    rows = summarise(results)
    assert rows[0]["minus_first"] == {}
    step = 500 / 1000 / math.log(2)  # one nat a token of prose, in its bits a byte
    assert rows[1]["minus_first"]["prose"]["value"] == pytest.approx(step)
    assert rows[1]["minus_first"]["code"]["value"] == pytest.approx(0.0)
    lines = table(rows)
    assert lines[0].split()[:2] == ["setting", "seeds"] and "prose" in lines[0]
    assert lines[2].startswith("lr=1") and lines[2].endswith("*")


def test_long_prose_is_cut_at_blank_lines_and_nothing_is_lost():
    paragraphs = [f"paragraph {n} " + "word " * 200 for n in range(20)]
    cut = pieces(Document("book", "\n\n".join(paragraphs)))
    assert len(cut) == 5 and "".join(d.text for d in cut).split() == " ".join(paragraphs).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, Path]:
    """Two domains of real text; one document of `library` is in `other` too."""
    folder = tmp_path_factory.mktemp("text")
    documents = [d.text for d in read_python_library() if 1500 < len(d.text) < 12_000]
    parts = {"library": documents[0::2][:60], "other": [*documents[1::2][:60], documents[0]]}
    for name, texts in parts.items():
        lines = [json.dumps({"text": one}) for one in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: folder / f"{name}.jsonl" for name in parts}


@pytest.fixture(scope="module")
def data(text, tmp_path_factory) -> SweepData:
    return prepare_data(tmp_path_factory.mktemp("data") / "data", text, 512, 12_000)


def test_held_out_text_of_each_domain_is_counted_and_in_no_training_text(data):
    import numpy
    import sentencepiece

    model = data.tokenizer_flags[data.tokenizer_flags.index("--tokenizer-model") + 1]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    trained = tokenizer.decode(numpy.fromfile(data.train[0] + ".bin", numpy.uint16).tolist())
    assert list(data.domains) == ["library", "other"]
    for domain in data.domains.values():
        ids = numpy.fromfile(domain["prefix"] + ".bin", numpy.uint16)
        assert len(ids) == domain["tokens"]
        heldout = tokenizer.decode(ids.tolist())
        assert len(heldout.encode()) == domain["bytes"] > 3000
        assert heldout[200:600] not in trained


def test_a_description_written_by_hand_is_read_and_a_bad_one_refused(data, tmp_path):
    record = {
        "train": ["0.3", data.train[0]],
        "tokenizer_flags": ["--tokenizer-type", "NullTokenizer"],
        "domains": {"mine": {"prefix": data.train[0], "tokens": 10, "bytes": 30}},
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(record))
    read = load_data(path)
    assert read.train == ("0.3", data.train[0]) and read.domains["mine"]["bytes"] == 30
    path.write_text(json.dumps({"train": []}))
    with pytest.raises(ValueError, match=r"--data .*domains"):
        load_data(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "lr", "1"], "give --train-iters"),
        (["--seed", "1", "--train-iters", "3"], "--seed is set by the sweep"),
        (["--domain", "all=x", "--train-iters", "3"], "--domain all=x: wanted NAME=FILE"),
        (["--domain", "a=none.jsonl", "--train-iters", "3"], "--domain none.jsonl: no such file"),
        (["--data", "none.json", "--train-iters", "3"], "--data none.json: no such file"),
        (["--seeds", "1", "1", "--train-iters", "3"], "--seeds [1, 1]: each must be another"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--output", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.evidence  # 20 s; the examples run it too
def test_the_real_trainer_is_run_and_its_losses_are_of_each_domain(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [
        *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--k2-threads", "1"),
        *("--num-layers", "2", "--moe-layer-freq", "([0]*1+[1]*1)", "--num-workers", "0"),
        *("--micro-batch-size", "4", "--global-batch-size", "4", "--train-iters", "3"),
        *("--optimizer", "muonclip", "--use-distributed-optimizer", "--lr", "1e-3"),
    ]
    sweep = Sweep(tmp_path / "out", data)
    result = run_cell(sweep, Cell((), tuple(flags), 7))
    nats = result["nats_per_token"]
    assert list(nats) == ["library", "other"] and nats["library"] != nats["other"]
    # Three small steps from a uniform guess over 512 pieces.
    assert all(abs(loss - math.log(512)) < 0.5 for loss in nats.values())
    assert (
        result["iteration"] == 3 and (sweep.folder(Cell((), tuple(flags), 7)) / "log.txt").exists()
    )
