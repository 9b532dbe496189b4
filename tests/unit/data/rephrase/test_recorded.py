"""The pipeline on what a real, small model said: recorded answers, given by the real server."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path

from megatron_k2.data.rephrase.command import run
from megatron_k2.data.rephrase.flags import parser
from megatron_k2.engine.server.recording import make_replay_app, read_records
from tests.unit.engine.scripted_engine import serving

ROOT = Path(__file__).resolve().parents[4]
EXAMPLE = ROOT / "examples" / "smollm2"
ANSWERS = Path(__file__).parent / "smollm2_answers.jsonl"
NUM_DOCUMENTS = 6
REJECTED = {"copied": 8, "leak": 5, "truncated": 3, "numbers": 2, "clauses": 1, "length": 1}


def example_flags(url: str, output: Path) -> list[str]:
    """The example's own flags, for another server and folder."""
    script = (EXAMPLE / "rephrase.sh").read_text().replace("\\\n", " ")
    words = shlex.split(script[script.index("tools/rephrase_data.py") :])[1:]
    for flag, value in (("--input", str(EXAMPLE / "documents.jsonl")), ("--output", str(output))):
        words[words.index(flag) + 1] = value
    words[words.index("--server") + 1] = url
    return words


def test_a_small_models_answers_are_judged_and_nearly_all_rejected(tmp_path: Path) -> None:
    records = read_records(ANSWERS)
    app = make_replay_app(records, "smollm2-135m-instruct")
    with serving(app) as url, contextlib.redirect_stdout(io.StringIO()):
        # A request that was not recorded stops the run: then record the answers again, as
        # examples/smollm2/README.md says.
        failed = run(parser().parse_args(example_flags(url, tmp_path)))
    assert failed == []
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["documents"] == NUM_DOCUMENTS
    assert (report["rewritings"], report["rewritings_dropped"]) == (1, NUM_DOCUMENTS - 1)
    assert report["requests"] == len(records)
    # It copies, tells of its task, does not stop, and loses numbers: the example's README.
    assert report["rejected_by_check"] == REJECTED
    said = ", ".join(f"{check} {count}" for check, count in REJECTED.items())
    assert f"| {said} |" in (EXAMPLE / "README.md").read_text()
    used = [answer["usage"]["completion_tokens"] for answer in records.values()]
    assert report["completion_tokens"] == sum(used)
