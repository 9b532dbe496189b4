"""Stages: built once, published whole, refused when their inputs change; the folder's lock."""

import os
import subprocess

import pytest

from megatron_k2.training import stages


def builder(calls: list[str], fail: bool = False):
    def build(folder):
        calls.append("built")
        (folder / "data").write_text("x")
        if fail:
            raise KeyboardInterrupt
        return {"count": 1}

    return build


def test_a_stage_is_built_once(tmp_path):
    calls: list[str] = []
    first = stages.run_stage(tmp_path / "s", {"a": (1, 2)}, builder(calls))
    second = stages.run_stage(tmp_path / "s", {"a": (1, 2)}, builder(calls))
    assert first == ({"count": 1}, True) and second == ({"count": 1}, False)
    assert calls == ["built"]


def test_other_inputs_are_refused_and_named(tmp_path):
    stages.run_stage(tmp_path / "s", {"--input": "a", "b": 1}, builder([]))
    with pytest.raises(ValueError, match=r"holds a run with other --input; give another --output"):
        stages.run_stage(tmp_path / "s", {"--input": "c", "b": 1}, builder([]))


def test_an_interrupted_stage_is_not_there_and_is_built_again(tmp_path):
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stages.run_stage(tmp_path / "s", {}, builder(calls, fail=True))
    assert not (tmp_path / "s").exists()
    assert stages.run_stage(tmp_path / "s", {}, builder(calls)) == ({"count": 1}, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_fingerprint_reads_content_only_up_to_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"same" + b"x")
    (tmp_path / "b").write_bytes(b"same" + b"y")
    assert stages.fingerprint(tmp_path / "a", 4) == stages.fingerprint(tmp_path / "b", 4)
    assert stages.fingerprint(tmp_path / "a", 5) != stages.fingerprint(tmp_path / "b", 5)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: not readable as JSON"):
        stages.read_json(tmp_path / "plan.json")
    assert stages.read_json(tmp_path / "none.json") is None


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path):
    refusal = f"another run \\(process {os.getpid()}\\) is writing it"
    again = stages.locked(tmp_path)
    with stages.locked(tmp_path), pytest.raises(ValueError, match=refusal), again:
        pass
    with stages.locked(tmp_path):
        pass


def test_what_is_left_of_a_killed_run_is_waited_for(tmp_path, monkeypatch):
    with stages.locked(tmp_path) as lock:
        orphan = subprocess.Popen(["sleep", "1"], pass_fds=(lock,))
    (tmp_path / ".lock").write_text("999999999")  # the launcher's number, which is gone
    with stages.locked(tmp_path):
        assert orphan.wait(0.1) == 0
    monkeypatch.setattr(stages, "ORPHANS_S", 0.3)
    with stages.locked(tmp_path) as lock:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    (tmp_path / ".lock").write_text("999999999")
    with pytest.raises(ValueError, match="another run"), stages.locked(tmp_path):
        pass
    orphan.kill()
    orphan.wait()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), stages.locked(tmp_path / "file"):
        pass
