"""The same files from a server as from the script in the process."""

from __future__ import annotations

from pathlib import Path

from tests.unit.agentic.models.answering_app import answering
from tests.unit.agentic.stages.small_run import published, run

SIZE = ("--evolved-tools", "24")


def test_over_http_the_same_files_come_out(tmp_path: Path) -> None:
    script = ("--out", str(tmp_path / "script"), "--model", "scripted", "--record", *SIZE)
    assert run(*script) == []
    with answering(tmp_path / "script" / "answers") as (url, served):
        assert run("--out", str(tmp_path / "http"), "--model", f"{url},scripted", *SIZE) == []
    assert published(tmp_path / "http") == published(tmp_path / "script")
    assert served["answered"] > 24 and not served["refused"]
    assert list((tmp_path / "http" / "answers").iterdir())  # a server's answers are recorded
