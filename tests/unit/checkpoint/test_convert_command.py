"""``tools/convert_checkpoint.py``: what it prints, and what its exit status says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.training import convert
from tests.unit.checkpoint.hf_models import tensors_of
from tests.unit.checkpoint.kills import REAL, ROOT
from tests.unit.checkpoint.megatron_side import make_small

COMMANDS = ("plan", "to-megatron", "to-hf", "verify")


def run(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else REAL
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        timeout=120, check=False,
    )  # fmt: skip


def test_help_has_an_example_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("--help")
    assert found.returncode == 0
    examples = found.stdout[found.stdout.index("examples:") :]
    for arguments, status in (*(([c, "--help"], 0) for c in COMMANDS), ([], 2), (["plan"], 2)):
        with pytest.raises(SystemExit) as raised:
            convert.main(arguments)
        assert raised.value.code == status
    for command in COMMANDS:
        assert f"convert_checkpoint.py {command} " in examples


def test_a_conversion_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    source = make_small(tmp_path / "hf", fp8=True)
    code = (
        "import sys\n"
        "from megatron_k2.training import convert\n"
        "for command in (['plan', 'hf'], ['to-megatron', 'hf', 'm', '--quiet'],\n"
        "                ['to-hf', 'm', 'again', '--quiet'], ['verify', 'm', 'again']):\n"
        "    assert convert.main([command[0], *(sys.argv[1] + '/' + n if n[0] != '-' else n\n"
        "                                       for n in command[1:])]) == 0, command\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    found = run(tmp_path, code=code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"
    for path in source.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_plan_in_json_says_what_the_conversion_then_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "hf")
    assert convert.main(["plan", str(source), "--json", "--target", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    tensors = tensors_of(conversions.hf_source.open_source(source).folder.config)
    assert plan["source"] == str(source)
    assert plan["tensors"] == len(tensors)
    assert plan["weights"] == sum(tensor.numel() for tensor in tensors.values())
    assert plan["bytes_read"] == sum(tensor.nbytes for tensor in tensors.values())
    assert plan["bytes_free"] > 0
    release = conversions.to_megatron(source, tmp_path / "m", Options(), workers=1, quiet=True)
    written = {path for path in release.rglob("*") if path.is_file()}
    small = {release / "metadata.json", release / "megatron_k2_manifest.json"}
    assert plan["bytes_written"] == sum(path.stat().st_size for path in written - small)
    assert convert.main(["plan", str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == len(list(source.iterdir()))


def test_plan_in_words_names_the_direction_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    assert convert.main(["plan", str(source), "--target", str(tmp_path / "not/there")]) == 0
    text = capsys.readouterr().out
    assert "to-megatron, every tensor taken once" in text and "bytes written" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_whole_round_on_the_command_line_ends_with_status_zero(tmp_path: Path) -> None:
    source = make_small(tmp_path / "hf", fp8=True)
    for arguments in (
        ["to-megatron", source, tmp_path / "m", "--quiet", "--workers=1"],
        ["to-hf", tmp_path / "m", tmp_path / "again", "--quiet"],
        ["verify", tmp_path / "m", tmp_path / "again"],
    ):
        found = run(*arguments)
        assert found.returncode == 0, found.stderr
        assert "Traceback" not in found.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("command", COMMANDS)
def test_source_that_is_nothing_is_one_line_and_status_two(tmp_path: Path, command: str) -> None:
    target = [tmp_path / "out"] if command != "plan" else []
    found = run(command, tmp_path / "nothing", *target)
    assert found.returncode == 2
    assert found.stderr.startswith("convert_checkpoint.py: ") and found.stderr.count("\n") == 1


def test_error_of_the_disk_is_one_line_and_status_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_small(tmp_path / "hf")

    def full(*unused: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "m"))

    monkeypatch.setattr("megatron_k2.checkpoint.stream.direct_io.File.write", full)
    arguments = ["to-megatron", str(source), str(tmp_path / "m"), "--quiet", "--workers=1"]
    assert convert.main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert convert.main(arguments) == 0  # and goes on


def test_weights_and_shards_are_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "hf", fp8=True)
    assert convert.main(["to-megatron", str(source), str(tmp_path / "m"), "--quiet"]) == 0
    like = str(make_small(tmp_path / "like", num_shards=1))
    for arguments, num_shards in (
        (["--weights=bf16"], 3),
        (["--weights=fp8", "--scales=fresh"], 3),
        (["--like", like, "--weights=fp32"], 1),
    ):
        out = tmp_path / "-".join(a.strip("-=").replace("/", "") for a in arguments)[:40]
        command = ["to-hf", str(tmp_path / "m"), str(out), "--quiet", *arguments]
        assert convert.main(command) == 0, capsys.readouterr().err
        assert len(list(out.glob("*.safetensors"))) == num_shards
        assert convert.main(["verify", str(tmp_path / "m"), str(out)]) == 0
    assert convert.main(["to-hf", str(tmp_path / "m"), str(tmp_path / "x"), "--scales=original",
                         "--weights=bf16"]) == 2  # fmt: skip


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "hf", fp8=True)
    assert convert.main(["to-megatron", str(source), str(tmp_path / "m"), "--quiet"]) == 0
    weights = tmp_path / "m" / "release" / "__0_0.distcp"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert convert.main(["to-hf", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]) == 2
    assert "__0_0.distcp: checksum" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_kind_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "hf")
    assert convert.main(["to-megatron", str(source), str(tmp_path / "m"), "--quiet"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "m"), str(tmp_path / "back"), "--quiet"]) == 0
    assert convert.main(["verify", str(source), str(tmp_path / "back")]) == 2
    assert "of the same kind as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("plan", ["--shard-gb=inf"]), ("plan", ["--shard-gb=0"]), ("to-hf", ["--shard-gb=nan"]),
        ("to-hf", ["--shard-gb=-3"]), ("plan", ["--disk-gb-per-s=0"]),
        ("plan", ["--disk-gb-per-s=-2"]), ("plan", ["--vocab-size=0"]),
        ("to-megatron", ["--workers=0"]), ("verify", ["--hidden-states", "--tokens=0"]),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_by_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, flags: list[str]
) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "b")][: 1 if command == "plan" else 2]
    with pytest.raises(SystemExit) as raised:
        convert.main([command, *paths, *flags])
    assert raised.value.code == 2
    flag, _, value = flags[-1].partition("=")
    assert f"argument {flag}: {value}: not a " in capsys.readouterr().err


def test_flags_of_the_other_direction_and_a_target_that_is_the_source_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_small(tmp_path / "hf"))
    megatron = str(tmp_path / "m")
    assert convert.main(["to-megatron", source, megatron, "--quiet", "--workers=1"]) == 0
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (["plan", megatron, "--dtype=fp32"], "--dtype: of to-megatron, but"),
        (["plan", source, "--like=/nowhere", "--weights=bf16"], "--weights, --like: of to-hf, but"),
        (["to-megatron", source, source + "/."], "is the source; give another folder"),
    ):
        assert convert.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
