"""Dialogues to packed rows: what is learned, truncation, packing, kills, workers, formats."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.data.dialogues.command import preprocess
from megatron_k2.data.dialogues.encode import DialogueEncoder, Encoded, Options
from megatron_k2.data.dialogues.packing import pack
from megatron_k2.data.dialogues.units import Job, make_unit, unit_path
from megatron_k2.data.preprocess.sources import find_sources
from tests.unit.chat.kimi_files import write_thinking_tokenizer, write_tokenizer

TOOL = Path(__file__).resolve().parents[4] / "tools" / "preprocess_sft.py"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": function}]}


def with_tool(city: Any = "Rome") -> dict[str, Any]:
    return {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": "weather?"},
            call(city),
            {"role": "tool", "tool_call_id": "a", "content": "19.99"},
            {"role": "assistant", "content": "19.99"},
        ],
    }


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("kimi"))


def encoder(tokenizer: Path, **options: Any) -> DialogueEncoder:
    return DialogueEncoder(Options(str(tokenizer), **options))


def only(found: list[Encoded] | str) -> Encoded:
    """The one sequence of a dialogue."""
    assert isinstance(found, list)
    (one,) = found
    return one


def learned_text(tokenizer: Path, found: list[Encoded] | str | Encoded) -> list[str]:
    """The stretches that are learned, as text."""
    encoded = found if isinstance(found, Encoded) else only(found)
    kimi, texts, before = KimiFormat.load(tokenizer), [], 0
    for token, learned in zip(encoded.ids.tolist(), encoded.learned.tolist(), strict=True):
        if learned:
            texts += [] if before else [[]]
            texts[-1].append(token)
        before = learned
    return [kimi.decode(ids) for ids in texts]


def test_assistants_words_and_their_ends_are_learned_and_nothing_else(tokenizer: Path) -> None:
    found = encoder(tokenizer).encode(chat("hi", "one", "and?", "two"))
    assert learned_text(tokenizer, found) == ["one<|im_end|>", "two<|im_end|>"]
    found = encoder(tokenizer, last_answer_only=True).encode(chat("hi", "one", "and?", "two"))
    assert learned_text(tokenizer, found) == ["two<|im_end|>"]
    weighted = chat("hi", "one", "and?", "two")
    weighted["messages"][3]["weight"] = 0
    assert learned_text(tokenizer, encoder(tokenizer).encode(weighted)) == ["one<|im_end|>"]
    calls = learned_text(tokenizer, encoder(tokenizer).encode(with_tool()))
    assert calls[0].startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weat")
    assert calls[1] == "19.99<|im_end|>"


def test_what_is_too_long_is_cut_as_asked(tokenizer: Path) -> None:
    dialogue = chat("a b c", "first answer", "d e f", "second answer " * 20)
    whole = only(encoder(tokenizer).encode(dialogue))
    short = {"seq_length": len(whole.ids) - 5}
    turns = encoder(tokenizer, **short).encode(dialogue)
    assert learned_text(tokenizer, turns) == ["first answer<|im_end|>"]
    assert only(turns).notes["tokens cut off"] > 20
    cut = encoder(tokenizer, truncation="cut", **short).encode(dialogue)
    assert len(only(cut).ids) == short["seq_length"] + 1
    assert encoder(tokenizer, truncation="drop", **short).encode(dialogue) == "too long"
    assert encoder(tokenizer, seq_length=4).encode(dialogue) == "too long"
    with pytest.raises(ValueError, match="more than --seq-length"):
        encoder(tokenizer, truncation="error", **short).encode(dialogue)


def test_calls_that_their_declaration_does_not_allow_are_counted_or_dropped(
    tokenizer: Path,
) -> None:
    found = encoder(tokenizer).encode(with_tool(7))
    assert only(found).notes["call problems"] == 1
    drops = encoder(tokenizer, tool_checks="drop")
    assert drops.encode(with_tool(7)) == "a tool call that its declaration does not allow"
    assert isinstance(drops.encode(with_tool()), list)


def test_each_thought_is_learned_once_after_what_stood_before_it(tmp_path: Path) -> None:
    thinking = write_thinking_tokenizer(tmp_path)
    dialogue = chat("a", "one", "b", "two")
    for turn in (1, 3):
        dialogue["messages"][turn]["reasoning_content"] = f"thought {turn}"
    found = encoder(thinking, template="kimi-k2-thinking").encode(dialogue)
    assert isinstance(found, list) and len(found) == 2
    texts = [learned_text(thinking, one) for one in found]
    assert texts == [
        ["<think>thought 1</think>one<|im_end|>"],
        ["<think>thought 3</think>two<|im_end|>"],
    ]
    plain = encoder(thinking, template="kimi-k2-thinking", learn_reasoning=False).encode(dialogue)
    assert isinstance(plain, list)
    assert [learned_text(thinking, one) for one in plain] == [["one<|im_end|>"], ["two<|im_end|>"]]


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_packing_places_each_dialogue_once_and_wastes_little(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(1, capacity + 1, size=500)
    rows = pack(lengths, capacity, seed=1)
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert all(lengths[row].sum() <= capacity for row in rows)
    fewest = -(-int(lengths.sum()) // capacity)
    assert len(rows) <= 11 / 9 * fewest + 6 / 9  # best-fit decreasing, Dosa 2007
    assert rows == pack(lengths, capacity, seed=1)
    if capacity > 1:
        assert rows != pack(lengths, capacity, seed=2)
    with pytest.raises(ValueError, match="must take 1 to"):
        pack(np.array([capacity + 1]), capacity, 0)


def corpus(path: Path, number: int = 300) -> Path:
    rng = np.random.default_rng(3)
    with path.open("w") as file:
        for at in range(number):
            words = [" ".join(map(str, rng.integers(0, 99, rng.integers(1, 30)))) for _ in "abcd"]
            row = with_tool(f"city {at}") if at % 3 == 0 else chat(*words)
            file.write(json.dumps(row) + "\n")
    return path


def arguments(tokenizer: Path, source: Path, prefix: Path, *more: str) -> list[str]:
    return [
        *("--input", str(source), "--output-prefix", str(prefix), "--seq-length", "256"),
        *("--tokenizer-model", str(tokenizer), "--heldout-share", "0.1", *more),
    ]


def published(prefix: Path) -> dict[str, bytes]:
    files = sorted(prefix.parent.glob(prefix.name + "*"))
    return {file.name.removeprefix(prefix.name): file.read_bytes() for file in files}


def test_rows_come_back_by_megatrons_reader_and_every_dialogue_is_in_one(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = corpus(tmp_path / "in.jsonl")
    assert preprocess(arguments(tokenizer, source, tmp_path / "chat", "--workers", "1")) is None
    printed = capsys.readouterr().out
    assert "[train]" in printed and "[heldout]" in printed and "answers 600" in printed
    wanted = [encoder(tokenizer, seq_length=256).encode(json.loads(x)) for x in source.open()]
    by_ids = {one.ids.tobytes(): one.learned for one in map(only, wanted)}
    seen = []
    for name in ("train", "heldout"):
        tokens = IndexedDataset(str(tmp_path / f"chat_{name}"))
        learned = IndexedDataset(str(tmp_path / f"chat_{name}_learned"))
        assert np.array_equal(tokens.document_indices, learned.document_indices)
        for number in range(len(tokens)):
            ids = tokens[number].astype(np.int32)
            assert np.array_equal(by_ids[ids.tobytes()], learned[number])
            seen.append(ids.tobytes())
        for first, end in zip(tokens.document_indices, tokens.document_indices[1:], strict=False):
            assert (tokens.sequence_lengths[first:end] - 1).sum() <= 256
    assert sorted(seen) == sorted(by_ids)
    assert preprocess(["verify", str(tmp_path / "chat")]) == []
    preprocess(["show", str(tmp_path / "chat_train"), "0", "--tokenizer-model", str(tokenizer)])
    assert "<|im_middle|>>>>" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"chat.json is there"):
        preprocess(arguments(tokenizer, source, tmp_path / "chat"))


def test_workers_packing_of_files_and_kills_change_no_byte(tokenizer: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "in.jsonl")
    preprocess(arguments(tokenizer, source, tmp_path / "one", "--workers", "1"))
    parts = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "p1.jsonl").write_bytes(b"".join(parts[:100]))
    (tmp_path / "p2.jsonl.gz").write_bytes(gzip.compress(b"".join(parts[100:])))
    preprocess(arguments(tokenizer, tmp_path / "p*", tmp_path / "two", "--workers", "2"))
    command = [sys.executable, str(TOOL), *arguments(tokenizer, tmp_path / "p*", tmp_path / "k")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / "k.partial"
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(folder.glob("*/*.index.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for units in folder.glob("*/"):
        if not (units / "000001.index.npz").exists():
            (units / "000001.tokens.npy").write_bytes(b"torn")
    if list(folder.glob("*/*.index.npz")):
        with pytest.raises(ValueError, match="units of a run with other input or flags"):
            preprocess(
                [*arguments(tokenizer, tmp_path / "p*", tmp_path / "k"), "--truncate", "cut"]
            )
    if folder.exists():
        preprocess(arguments(tokenizer, tmp_path / "p*", tmp_path / "k"))
    wanted = published(tmp_path / "one")
    for name in ("two", "k"):
        found = published(tmp_path / name)
        assert found.keys() == wanted.keys()
        for file in wanted.keys() - {".json"}:
            assert found[file] == wanted[file], (name, file)
        assert json.loads(found[".json"])["notes"] == json.loads(wanted[".json"])["notes"]


def test_a_unit_that_is_made_again_leaves_the_files_that_are_mapped_alone(
    tokenizer: Path, tmp_path: Path
) -> None:
    # A killed run's worker finishes its unit beside the run that took over and has it mapped:
    # a file that shrinks under a map ends the process with SIGBUS.
    writer = encoder(tokenizer, seq_length=256)
    job = Job(find_sources([str(corpus(tmp_path / "in.jsonl", 20))]), writer.options)
    [unit] = job.units()
    make_unit(tmp_path, job, writer, unit)
    paths = [unit_path(tmp_path, 0, part) for part in ("tokens", "learned", "index")]
    before = [(path.stat().st_ino, path.read_bytes()) for path in paths]
    mapped = [np.load(path, mmap_mode="r") for path in paths[:2]]
    make_unit(tmp_path, job, writer, unit)
    for path, (inode, content) in zip(paths, before, strict=True):
        assert path.stat().st_ino != inode
        assert path.read_bytes() == content
    assert mapped[0].tobytes() == np.load(paths[0]).tobytes()


def test_sharegpt_and_parquet_give_the_same_rows(tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    ours = [chat("a", "b", "c", "d"), chat("e", "f")]
    names = {"user": "human", "assistant": "gpt"}
    foreign = [
        {
            "conversations": [
                {"from": names[m["role"]], "value": m["content"]} for m in r["messages"]
            ]
        }
        for r in ours
    ]
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    (tmp_path / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in foreign))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ours), tmp_path / "ours.parquet")
    found = []
    for number, source in enumerate(("ours.jsonl", "foreign.jsonl", "ours.parquet")):
        prefix = tmp_path / str(number) / "chat"
        preprocess(arguments(tokenizer, tmp_path / source, prefix))
        found.append({k: v for k, v in published(prefix).items() if k != ".json"})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"byte 0: not JSON .*--skip-bad-records"),
        ('{"text": "a"}', "a dialogue needs 'messages' or 'conversations'"),
        ('{"messages": [{"role": "king", "content": "a"}]}', r"messages\[0\].role: 'king'"),
        ("[1]", "a JSON object is needed, not list"),
    ],
)
def test_a_bad_record_is_named_or_counted(
    tokenizer: Path, tmp_path: Path, row: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(row + "\n" + json.dumps(chat("a", "b")) + "\n")
    with pytest.raises(ValueError, match=message):
        preprocess(arguments(tokenizer, source, tmp_path / "chat"))
    preprocess(arguments(tokenizer, source, tmp_path / "chat", "--skip-bad-records"))
    notes = json.loads((tmp_path / "chat.json").read_text())["notes"]
    assert notes["left out: malformed"] == 1 and notes["answers"] == 1
    assert not os.path.exists(tmp_path / "chat.partial")
