"""The command lines of the main job, and how many steps are planned."""

import pytest

from megatron_k2.training.from_text import main, planned_steps
from megatron_k2.training.job import Job, Settings, eval_interval, log_interval


def value(arguments: list[str], flag: str) -> str:
    """Return a flag's last value: argparse takes the last."""
    return arguments[len(arguments) - arguments[::-1].index(flag)]


@pytest.mark.parametrize("train_iters", [1, 2, 3, 12, 20, 97, 256, 1000])
def test_evaluations_are_about_four_and_never_twice_at_the_end(train_iters):
    interval = eval_interval(train_iters)
    assert train_iters % interval != 0 or interval > train_iters
    assert train_iters // interval <= 4


def test_progress_is_every_few_seconds_and_ten_times_a_run_at_least():
    assert log_interval(1000, 0.5) == 10
    assert log_interval(1000, 60.0) == 1
    assert log_interval(20, 0.01) == 2


def test_the_probe_changes_no_weight_and_evaluates_once_at_its_end(tmp_path):
    arguments = Job(tmp_path, Settings(flags=("--lr", "5e-3"))).probe_arguments()
    assert value(arguments, "--lr") == "0"
    assert value(arguments, "--moe-router-bias-update-rate") == "0"
    assert int(value(arguments, "--eval-interval")) > int(value(arguments, "--train-iters"))
    assert "--save" not in arguments


def test_training_is_resumed_only_where_a_checkpoint_is(tmp_path):
    job = Job(tmp_path)
    assert "--load" not in job.train_arguments(100, 0.5)
    job.checkpoints.mkdir()
    (job.checkpoints / "latest_checkpointed_iteration.txt").write_text("50")
    resumed = job.train_arguments(100, 0.5)
    assert value(resumed, "--load") == value(resumed, "--save") == str(job.checkpoints)


def test_the_users_flags_win(tmp_path):
    job = Job(tmp_path, Settings(flags=("--lr", "5e-3")))
    assert value(job.train_arguments(100, 0.5), "--lr") == "5e-3"


def test_the_model_has_the_tokenizers_vocabulary(tmp_path):
    job = Job(tmp_path, vocab_size=300)
    for arguments in (job.train_arguments(100, 0.5), job.sample_arguments("text")):
        assert value(arguments, "--vocab-size") == "300"


def test_steps_fill_the_minutes_after_the_evaluations():
    plan = {"seconds_per_iteration": 0.5, "evaluation_s": 5.0}
    assert planned_steps(plan, 3) == (180 - 4 * 5) / 0.5
    slow = {"seconds_per_iteration": 100.0, "evaluation_s": 300.0}
    assert planned_steps(slow, 1) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl"], "--input none.jsonl: no such file"),
        (["--minutes", "0"], "--minutes 0 must be a number above 0"),
        (["--train-iters", "0"], "--train-iters 0 must be at least 1"),
        (["--k2-preset", "k9"], "--k2-preset 'k9' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_jsonl_without_text_is_refused_with_its_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    assert main(["--input", "a.jsonl"]) == 2
    assert 'line 2 has no "text" field' in capsys.readouterr().err
