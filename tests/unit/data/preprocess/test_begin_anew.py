"""What an earlier run left: it blocks only where it merged something, and then says what to do."""

from __future__ import annotations

import json

import pytest

from megatron_k2.data.preprocess import publish, run
from tests.unit.data.preprocess.inputs import contents, jsonl, kimi_flags, packed, tokenise

GOOD = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(9))
SMALL = ["--block-bytes", "30", "--commit-s", "0"]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return kimi_flags(tmp_path_factory.mktemp("kimi"))


def test_a_run_that_merged_nothing_blocks_no_other_job(kimi, tmp_path) -> None:
    path, prefix = packed(tmp_path / "a.jsonl", b"broken\n" + GOOD.encode()), tmp_path / "o"
    with pytest.raises(ValueError, match="--skip-bad-records leaves such out"):
        tokenise(prefix, [path], *kimi)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        tokenise(prefix, [path], *kimi, "--append-eod", *SMALL)  # another job
    packed(path, GOOD.encode())  # corrected input is another job too
    tokenise(prefix, [path], *kimi)
    fresh, found = contents(tokenise(tmp_path / "fresh", [path], *kimi)), contents(prefix)
    assert all(found[name] == fresh[name] for name in found if name != ".json")
    assert not prefix.with_name("o.partial").exists()


def test_bad_records_are_skipped_from_where_the_run_stopped(kimi, tmp_path, monkeypatch) -> None:
    path, prefix = packed(tmp_path / "a.jsonl", GOOD.encode() + b"broken\n"), tmp_path / "o"
    with pytest.raises(ValueError, match="line 10 is not JSON"):
        tokenise(prefix, [path], *kimi, *SMALL)
    made, make = [], run.worker.PartMaker.make
    with monkeypatch.context() as patch:
        patch.setattr(
            run.worker.PartMaker, "make", lambda self, unit: made.append(unit) or make(self, unit)
        )
        tokenise(prefix, [path], *kimi, *SMALL, "--skip-bad-records")
    assert len(made) == 1, "what was merged is kept"
    whole = contents(tokenise(tmp_path / "w", [path], *kimi, "--skip-bad-records"))
    found = contents(prefix)
    assert found["_text_document.bin"] == whole["_text_document.bin"]
    assert json.loads(found[".json"])["totals"] == json.loads(whole[".json"])["totals"]


def test_what_was_skipped_stays_skipped_or_is_refused(kimi, tmp_path) -> None:
    lines = GOOD.splitlines(keepends=True)
    data = "".join([*lines[:3], "broken\n", *lines[3:], '{"body": 1}\n'])
    path, prefix = packed(tmp_path / "a.jsonl", data.encode()), tmp_path / "o"
    skip = [*kimi, *SMALL, "--skip-bad-records"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "finish", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            tokenise(prefix, [path], *skip)
    with pytest.raises(ValueError, match="begun with --skip-bad-records, which left out 2: give"):
        tokenise(prefix, [path], *kimi, *SMALL)
    tokenise(prefix, [path], *skip)


def test_what_was_merged_blocks_another_job_and_the_message_says_what_to_do(kimi, tmp_path) -> None:
    path, prefix = packed(tmp_path / "a.jsonl", GOOD.encode() + b"broken\n"), tmp_path / "o"
    with pytest.raises(ValueError, match="line 10"):
        tokenise(prefix, [path], *kimi, *SMALL)
    with pytest.raises(ValueError, match="other input or other flags") as refused:
        tokenise(prefix, [path], *kimi, *SMALL, "--append-eod")
    message = str(refused.value)
    assert message.startswith(f"--output-prefix {prefix}: {prefix}.partial holds 8 documents")
    assert f"rm -r {prefix}.partial" in message and "conversion" not in message


def test_no_token_is_refused_and_blocks_nothing(kimi, tmp_path) -> None:
    prefix = tmp_path / "o"
    for data in (b"", b"\n\n", b'{"text": ""}\n'):
        path = packed(tmp_path / "a.jsonl", data)
        with pytest.raises(ValueError, match=r"--input .*a\.jsonl: not one token of text in \d"):
            tokenise(prefix, [path], *kimi)
    rows = '{"text": "a", "more": ""}\n'
    with pytest.raises(ValueError, match=r"not one token of more in 1 documents.*--json-keys"):
        tokenise(prefix, [packed(path, rows.encode())], *kimi, "--json-keys", "text", "more")


def test_the_same_command_after_the_last_rename_is_done_before(kimi, tmp_path, capsys) -> None:
    path, prefix = jsonl(tmp_path / "a.jsonl", ["a b", "c"]), tmp_path / "o"
    whole = contents(tokenise(prefix, [path], *kimi))
    prefix.with_name("o.partial").mkdir()  # killed before its last step
    tokenise(prefix, [path], *kimi)
    assert "written before, as asked for now: " in capsys.readouterr().out
    assert contents(prefix) == whole and not prefix.with_name("o.partial").exists()
    with pytest.raises(ValueError, match="is there; remove it, or give another --output-prefix"):
        tokenise(prefix, [path], *kimi, "--input-format", "text")
    with open(f"{prefix}_text_document.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="is there; remove it"):
        tokenise(prefix, [path], *kimi)
