"""tools/blend_data.py: wrong manifests and damaged side files are a line with the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_k2.data.blend.command import parser, run
from megatron_k2.data.blend.corpora import open_corpus
from megatron_k2.data.blend.manifest import Corpus, read_manifest
from tests.unit.data.preprocess.inputs import contents, jsonl, kimi_flags, tokenise

CORPORA = '[[corpora]]\nname = "web"\nprefix = "web"\n'
STAGE = (
    '[[stages]]\nname = "one"\nseq_length = 4\nglobal_batch_size = 1\nweights = { web = 1 }\n%s\n'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpora = 5\nstages = []", r"corpora = 5 must be tables, each under a line \[\[corpora"),
        ("corpora = ['a']\nstages = []", r"corpora = \['a'\] must be tables"),
        (f"stages = [5]\n{CORPORA}", r"stages = \[5\] must be tables, each under a line \[\[st"),
        (f"recipe = 5\n{CORPORA}{STAGE % ''}", "recipe = 5 must be a text"),
        (f"recipe = 'a'\nscale = 5\n{CORPORA}{STAGE % ''}", "scale = 5 must be a text"),
        (CORPORA + STAGE % "tokens = nan", "stage one: tokens = nan must be a number"),
        (CORPORA + STAGE % "tokens = inf", "stage one: tokens = inf must be a number"),
        (CORPORA + STAGE % "tokens = true", "stage one: tokens = True must be a number"),
        (CORPORA + STAGE % "tokens = -4e3", "stage one: tokens = -4000.0 are less than half"),
        ('[[corpora]]\nname = 5\nprefix = "web"\n' + STAGE % "", "corpus 5: name = 5 must be a t"),
    ],
)
def test_a_wrong_manifest_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "blend.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_manifest(path, lambda *_: [])


def test_damaged_side_files_are_named_with_their_corpus(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["a b c", "d e"])
    prefix = tokenise(tmp_path / "src", [path], *kimi_flags(tmp_path / "kimi"))
    corpus = Corpus("wiki", f"{prefix}_text_document", "d", "l", "s", 1, None, None)
    files, places = contents(prefix), Path(f"{prefix}.provenance.bin")
    summary = json.loads(files[".json"])
    side = open_corpus(corpus).side
    assert side is not None and len(side.places) == 2
    bad = {
        files[".json"][:90]: "damaged, not JSON",
        b"": "damaged, not JSON",
        b"\xff\xfe": "cannot be read",
        json.dumps(summary | {"sources": [{}]}).encode(): "damaged, lacks settings or sources",
        json.dumps(summary | {"sources": []}).encode(): "damaged, names sources",
    }
    for data, message in bad.items():
        Path(f"{prefix}.json").write_bytes(data)
        with pytest.raises(ValueError, match=rf"^corpus wiki: side file {prefix}\..*{message}"):
            open_corpus(corpus)
    for data in (b'{"text": "a"}\n{"text": "b"}\n', b"[1]"):  # another's file of that name
        Path(f"{prefix}.json").write_bytes(data)
        assert open_corpus(corpus).side is None
    Path(f"{prefix}.json").write_bytes(files[".json"])
    places.unlink()
    with pytest.raises(ValueError, match=f"^corpus wiki: side file {places}: No such file"):
        open_corpus(corpus)


def test_an_index_that_counts_less_than_nothing_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "web.bin").touch()
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04"
    (tmp_path / "web.idx").write_bytes(head + (2**64 - 1).to_bytes(8, "little") * 2)
    text = CORPORA.replace('prefix = "web"', f'prefix = "{tmp_path}/web"') + STAGE % "steps = 1"
    (tmp_path / "blend.toml").write_text(text)
    with pytest.raises(ValueError, match=r"^corpus web: prefix .*web\.idx is cut off"):
        run(parser().parse_args(["check", str(tmp_path / "blend.toml")]), lambda *_: [])
