"""Every tool is a command of ``megatron-k2``, whose help names no file of a checkout."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_k2 import __main__ as program
from megatron_k2.commands import COMMANDS, Command, as_typed, find, near

ROOT = Path(__file__).resolve().parents[2]
NO_COMMANDS = {"setup_venv", "docs_check"}  # of the checkout alone
TOOLS = [path.stem for path in sorted((ROOT / "tools").glob("*.py"))]
ROWS = [row for rows in COMMANDS.values() for row in rows]
# Their parser is Megatron's: its help needs K2 registered, in a process of its own.
STARTED_BY_TORCHRUN = {"pretrain", "sft", "rl", "sample"}


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in NO_COMMANDS])
def test_each_tool_is_a_command_and_only_calls_it(tool: str) -> None:
    row = find(tool.replace("_", "-"))
    assert row is not None, f"tools/{tool}.py: give it a row in megatron_k2/commands.py"
    module, _, function = row.target.partition(":")
    tree = ast.parse((ROOT / "tools" / f"{tool}.py").read_text())
    imported = {
        f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert f"megatron_k2.{module}:{function}" in imported
    called = "megatron_k2.training.command_line:run_tool" in imported
    assert called == row.is_plain
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not defined, f"tools/{tool}.py: what it does belongs into the package"


def test_names_and_summaries_are_each_once_and_short() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(0 < len(row.summary) <= 76 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_command_explains_itself_by_its_name(
    row: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if row.name in STARTED_BY_TORCHRUN:
        module, _, function = row.target.partition(":")
        source = ROOT / "megatron_k2" / (module.replace(".", "/") + ".py")
        assert f"\ndef {function}() -> int:" in source.read_text()
        return
    assert callable(row.load())
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(
        argparse.ArgumentParser, "_print_message", argparse.ArgumentParser._print_message
    )
    with pytest.raises(SystemExit) as end:
        program.main([row.name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: megatron-k2 {row.name}"), said[:200]
    files = [word for tool in TOOLS for word in (f"tools/{tool}.py", f" {tool}.py") if word in said]
    assert not [one for one in files if one.rpartition("/")[2].strip() not in NO_COMMANDS], files


def test_a_long_usage_is_renamed_with_its_lines() -> None:
    usage = "usage: gym.py [-h] --one ONE\n              --two TWO\n\n"
    renamed = "usage: megatron-k2 gym [-h] --one ONE\n    --two TWO\n\n"
    assert as_typed(usage + "  tools/gym.py list", "gym") == renamed + "  megatron-k2 gym list"
    wrapped = as_typed("--wrap '.venv/bin/python tools/gym.py list'", "gym")
    assert wrapped == "--wrap 'megatron-k2 gym list'"
    untouched = "rl/critic/serve.py, my_gym.py and /opt/tools/gym.py"
    assert as_typed(untouched, "gym") == untouched


def test_a_command_line_as_a_user_types_it(tmp_path: Path) -> None:
    """One process: the list, then a plain command's refusal, in one line and with status 2."""
    command = [sys.executable, "-m", "megatron_k2", "evaluate", "exact", "--tasks", "none.jsonl"]
    command += ["--server", "http://127.0.0.1:1", "--model", "m", "--output", str(tmp_path / "o")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode in (1, 2) and run.stderr.startswith("error: ")
    assert len(run.stderr.splitlines()) == 1


def test_the_list_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == program.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"\n  {row.name} ") == 2 and row.summary in said for row in ROWS)


def test_a_mistyped_command_is_told_what_it_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["convert_checkpoint"]) == 2
    assert "did you mean the command convert-checkpoint?" in capsys.readouterr().err
    assert near("preprocess_data.py") == "preprocess-data"
    assert program.main(["zzz"]) == 2
    assert capsys.readouterr().err == (
        "megatron_k2: error: SCRIPT zzz does not exist, and no command is so named\n"
    )


def test_a_file_is_a_script_and_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script runs registered, with its own arguments; of a command's name it is ``./NAME``."""
    ran: list[str] = []
    monkeypatch.setattr(program, "run_script", lambda arguments: ran.extend(arguments) or 0)
    assert program.main(["./gym", "--flag"]) == 0
    assert program.main(["--k2-megatron", "wheel", "pretrain_gpt.py"]) == 0
    assert ran == ["./gym", "--flag", "--k2-megatron", "wheel", "pretrain_gpt.py"]


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(
        argparse.ArgumentParser, "_print_message", argparse.ArgumentParser._print_message
    )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("megatron_k2.engine.server")]:
        monkeypatch.delitem(sys.modules, name)
    row = Command("serve", "engine.server.command:run", "")
    assert program.run_command(row, []) == 2
    said = capsys.readouterr().err
    assert "serve needs a package that is not installed" in said and "uvicorn" in said
    assert "`megatron-k2 doctor`" in said


def test_the_help_of_a_training_script_is_short_at_its_ends_and_closes_with_an_example() -> None:
    from megatron_k2.training import pretrain

    parser = pretrain.add_pretrain_args(argparse.ArgumentParser(prog="megatron-k2 pretrain"))
    said = parser.format_help()
    assert said.startswith("usage: megatron-k2 pretrain --k2-preset NAME [FLAGS]\n")
    assert "--train-iters 20 --lr 1e-3" in said[-300:] and "--k2-" in said[-80:]
