"""The doctor: all is well with a release as assumed, and each change is told by its name."""

import ast
import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from megatron_k2.checkpoint import doctor
from megatron_k2.checkpoint.doctor import examine, main
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.folder import INDEX
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES, encode_header
from megatron_k2.checkpoint.release.check import DIFFERS, MISSING, OK
from megatron_k2.checkpoint.release.expected import RELEASES, Expected, expected
from megatron_k2.checkpoint.release.tensors import Assumed, assumed_tensors
from megatron_k2.checkpoint.release.tokenizer import digest
from tests.unit.chat.kimi_files import CODE, small_ranks, write_chat_files, write_tokenizer
from tests.unit.checkpoint.hf_models import BASE, FP8, quantised, tensors_of, write_folder

NUM_RANKS = len(small_ranks())
CONFIG = BASE | {"vocab_size": NUM_RANKS + 256, "quantization_config": FP8}
SMALL = Expected(
    label="a small stand-in",
    config=CONFIG,
    eos_ids=(NUM_RANKS + 2,),
    num_ranks=NUM_RANKS,
    named={name: NUM_RANKS + offset for name, offset in CONTROL_TOKENS.items()},
    buffer=("BF16", (8,)),
    known_ids=(("a<|im_end|>", (97, NUM_RANKS + 2)),),
    functions={"cut": digest(ast.parse(CODE % "[]").body[1].body[3])},
    published={"config.json": {}},
)
BUFFER = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def write_release(folder: Path) -> Path:
    """Write a small block-FP8 release with buffers, tokenizer, template and code."""
    tensors = quantised(tensors_of(CONFIG))
    for layer in range(CONFIG["num_hidden_layers"]):
        tensors[BUFFER.format(layer)] = torch.zeros(8, dtype=torch.bfloat16)
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    together: dict[str, Any] = {}
    for name in tensors.keys() - scales:  # a weight and its scale in one shard
        together[name] = tensors[name]
    folder = write_folder(folder, CONFIG, dict(sorted(together.items())), num_shards=3)
    index = json.loads((folder / INDEX).read_text())
    for shard in sorted(set(index["weight_map"].values())):
        mine = load_file(folder / shard)
        mine |= {
            f"{n}_scale_inv": tensors[f"{n}_scale_inv"] for n in mine if f"{n}_scale_inv" in scales
        }
        save_file(mine, folder / shard, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(mine, shard)
    index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps(index))
    write_tokenizer(folder)
    write_chat_files(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": NUM_RANKS + 2}))
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def differing(folder: Path, assumed: Expected = SMALL) -> list[str]:
    """Return "area: name" of all checks that differ."""
    checks = examine(folder, assumed).checks
    return [f"{check.area}: {check.name}" for check in checks if check.status == DIFFERS]


def edit_json(name: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


def edit_tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = load_file(folder / shard)
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / shard, metadata={"format": "pt"})

    return edit


def test_a_release_as_assumed_is_all_ok(release: Path) -> None:
    report = examine(release, SMALL)
    wrong = [check for check in report.checks if check.status != OK]
    assert wrong == []
    assert report.counts == {OK: len(report.checks), DIFFERS: 0, MISSING: 0}
    assert len(report.checks) > 90
    sums = {file.name: file.sha256 for file in report.files}
    assert sums["config.json"] == hashlib.sha256((release / "config.json").read_bytes()).hexdigest()
    assert not any(name.endswith(".safetensors") for name in sums)


GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
CHANGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a number": (
        edit_json("config.json", lambda c: c.update(rms_norm_eps=1e-5)),
        ["config.json: rms_norm_eps"],
    ),
    "a field left out": (
        edit_json("config.json", lambda c: c.pop("scoring_func")),
        ["config.json: scoring_func"],
    ),
    "a nested field": (
        edit_json("config.json", lambda c: c["rope_scaling"].update(factor=64.0)),
        ["config.json: rope_scaling.factor"],
    ),
    "no FP8": (
        edit_json("config.json", lambda c: c.pop("quantization_config")),
        [f"config.json: quantization_config.{name}" for name in sorted(FP8)],
    ),
    "an unknown field": (
        edit_json("config.json", lambda c: c.update(attention_sinks=4)),
        ["config.json: other fields"],
    ),
    "another end": (
        edit_json("generation_config.json", lambda c: c.update(eos_token_id=[1, 2])),
        ["generation_config.json: eos_token_id"],
    ),
    "a tensor lost from the index": (
        edit_json(INDEX, lambda i: i["weight_map"].pop(GATE)),
        [
            "index: number of tensors",
            "index: tensors that are not there",
            "shards: tensors elsewhere than the index says",
        ],
    ),
    "a renamed tensor": (
        edit_json(INDEX, lambda i: i["weight_map"].update(x=i["weight_map"].pop(GATE))),
        [
            "index: tensors that are not there",
            "index: tensors beside these",
            "shards: tensors elsewhere than the index says",
        ],
    ),
    "another size": (
        edit_json(INDEX, lambda i: i["metadata"].update(total_size=7)),
        ["index: total_size (bytes)"],
    ),
    "a buffer lost": (
        edit_json(INDEX, lambda i: i["weight_map"].pop(BUFFER.format(1))),
        [
            "index: rotary inv_freq buffers",
            "index: total_size (bytes)",
            "shards: tensors elsewhere than the index says",
        ],
    ),
    "a dtype": (edit_tensor(BIAS, lambda t: t.bfloat16()), ["shards: dtypes"]),
    "a shape": (edit_tensor(GATE, lambda t: t[:-1].contiguous()), ["shards: shapes"]),
    "a buffer's shape": (
        edit_tensor(BUFFER.format(0), lambda t: t[:-1].contiguous()),
        ["shards: shapes"],
    ),
    "one rank fewer": (
        lambda f: drop_last_rank(f),
        ["tiktoken.model: readable"],
    ),
    "a hole in the ranks": (
        lambda f: drop_last_rank(f, 2),
        ["tiktoken.model: readable"],
    ),
    "a renamed control token": (
        edit_text("tokenizer_config.json", "<|im_middle|>", "<|im_centre|>"),
        ["tokenizer_config.json: id of <|im_middle|>", "tokenizer_config.json: other names"],
    ),
    "another eos_token": (
        edit_json("tokenizer_config.json", lambda c: c.update(eos_token="<|im_end|>")),
        ["tokenizer_config.json: eos_token"],
    ),
    "another class": (
        edit_json("tokenizer_config.json", lambda c: c.update(tokenizer_class="Other")),
        ["tokenizer_config.json: tokenizer_class"],
    ),
    "another pattern": (
        edit_text("tokenization_kimi.py", "{1,3}", "{1,4}"),
        ["tokenization_kimi.py: pat_str"],
    ),
    "another slice": (
        edit_text("tokenization_kimi.py", "400_000", "300_000"),
        ["tokenization_kimi.py: TIKTOKEN_MAX_ENCODE_CHARS"],
    ),
    "another run": (
        edit_text("tokenization_kimi.py", "25_000", "2_500"),
        ["tokenization_kimi.py: MAX_NO_WHITESPACES_CHARS"],
    ),
    "other code": (
        edit_text("tokenization_kimi.py", "return [text]", "return [text.strip()]"),
        ["tokenization_kimi.py: cut() (digest)"],
    ),
    "no Python": (
        edit_text("tokenization_kimi.py", "def", "deaf"),
        ["tokenization_kimi.py: readable"],
    ),
    "a converted tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["tokenizer: tokenizer.json of a conversion"],
    ),
    "a lost mark": (
        edit_text("chat_template.jinja", "'## Return of ' + ", "'## Result of ' + "),
        [
            "chat template: marks that are not in it",
            "chat template: text of two tool calls with results",
        ],
    ),
    "white space": (
        edit_text("chat_template.jinja", "<|im_end|>\\n' -}}", "<|im_end|>' -}}"),
        ["chat template: text of a question"],
    ),
    "two templates": (
        edit_json("tokenizer_config.json", lambda c: c.update(chat_template="x")),
        ["chat template: chat_template.jinja and tokenizer_config.json"],
    ),
    "a broken template": (
        edit_text("chat_template.jinja", "{%- endfor -%}", ""),
        [
            f"chat template: text of {name}"
            for name in (
                "a question",
                "a system message and a question",
                "two tool calls with results",
            )
        ],
    ),
}


def drop_last_rank(folder: Path, place: int = 1) -> None:
    lines = (folder / "tiktoken.model").read_bytes().splitlines(keepends=True)
    del lines[-place]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_is_told_by_its_name_and_nothing_else(release: Path, change: str) -> None:
    edit, names = CHANGES[change]
    edit(release)
    assert differing(release) == names


def test_ids_of_known_texts_show_another_vocabulary(release: Path) -> None:
    """Two ranks exchanged: as many tokens, other ids."""
    data = (release / "tiktoken.model").read_bytes()
    a, b = (base64.b64encode(letter) for letter in (b"a", b"b"))
    data = data.replace(a + b" 97\n", a + b" 98\n").replace(b + b" 98\n", b + b" 97\n")
    (release / "tiktoken.model").write_bytes(data)
    assert differing(release) == ["tiktoken.model: ids of 'a<|im_end|>'"]


def test_scales_in_another_shard_are_told(release: Path) -> None:
    def move(index: dict) -> None:
        shards = sorted(set(index["weight_map"].values()))
        name = next(name for name in index["weight_map"] if name.endswith("_scale_inv"))
        here = index["weight_map"][name]
        index["weight_map"][name] = next(shard for shard in shards if shard != here)

    edit_json(INDEX, move)(release)
    assert differing(release) == [
        "index: scales in another shard than their weight",
        "shards: tensors elsewhere than the index says",
    ]


def test_small_files_alone_are_enough(release: Path) -> None:
    shards = sorted(release.glob("*.safetensors"))
    for shard in shards[:-1]:
        shard.unlink()
    report = examine(release, SMALL)
    assert report.counts[DIFFERS] == 0
    (away,) = (check for check in report.checks if check.status == MISSING)
    assert away.name == "files" and away.found.startswith("1 are here; not model-00001-of-00003")
    shards[-1].unlink()
    report = examine(release, SMALL)
    assert report.counts[DIFFERS] == 0 and report.counts[MISSING] == 1
    assert not any(check.area == "headers" for check in report.checks)


def test_what_is_not_there_is_missing_and_no_difference(release: Path) -> None:
    for path in release.iterdir():
        if path.name != "config.json":
            path.unlink()
    report = examine(release, SMALL)
    assert report.counts[DIFFERS] == 0
    areas = {check.area for check in report.checks if check.status == MISSING}
    assert areas == {
        *("generation_config.json", "index", "tiktoken.model", "tokenizer_config.json"),
        *("tokenization_kimi.py", "chat template"),
    }


def test_a_shard_that_is_cut_short_and_a_stray_one_are_told(release: Path) -> None:
    first = min(release.glob("*.safetensors"))
    (release / "other.safetensors").write_bytes(first.read_bytes())
    first.write_bytes(first.read_bytes()[:-1])
    assert differing(release) == [
        "shards: files that the index does not name",
        "shards: files that are cut short or damaged",
    ]


def test_a_single_file_needs_no_index(tmp_path: Path, release: Path) -> None:
    whole: dict[str, torch.Tensor] = {}
    for shard in release.glob("*.safetensors"):
        whole |= load_file(shard)
        shard.unlink()
    (release / INDEX).unlink()
    save_file(whole, release / "model.safetensors", metadata={"format": "pt"})
    report = examine(release, SMALL)
    assert report.counts[DIFFERS] == 0
    assert [check.name for check in report.checks if check.status == MISSING] == [
        "total_size (bytes)"
    ]


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_files_that_cannot_be_read_are_told(release: Path, name: str) -> None:
    (release / name).write_text("{")
    assert any(line.endswith(": readable") for line in differing(release))


def test_an_index_that_leaves_the_folder_is_not_followed(release: Path) -> None:
    edit_json(INDEX, lambda i: i["weight_map"].update({GATE: "../x.safetensors"}))(release)
    assert differing(release) == ["index: readable"]


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "README.md").write_text("nothing")
    for folder, message in ((tmp_path, "no release; none of"), (tmp_path / "x", "not a folder")):
        with pytest.raises(ConversionRefused, match=message):
            examine(folder, SMALL)
        assert main(["--release", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_command_line_prints_a_table_or_json_and_ends_by_what_it_found(
    release: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "expected", lambda preset: SMALL)
    assert main(["--release", str(release)]) == 0
    text = capsys.readouterr().out
    assert " 0 differ, 0 not here to compare" in text and "vocab_size" in text
    edit_json("config.json", lambda c: c.update(rms_norm_eps=1e-5))(release)
    assert main(["--release", str(release), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"][DIFFERS] == 1
    (wrong,) = (check for check in report["checks"] if check["status"] == DIFFERS)
    assert (wrong["assumed"], wrong["found"]) == (1e-6, 1e-5)
    assert wrong["note"] == "as in K2.5 and later"
    assert main(["--release", str(release)]) == 1
    assert "differs rms_norm_eps" in capsys.readouterr().out


def test_kimi_k2s_config_is_the_published_one_byte_for_byte() -> None:
    """The preset and the fields beside it, in the order of the release, have its SHA-256."""
    release = expected("kimi-k2")
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    for name in ("Model", "ForCausalLM"):
        whole = "AutoModel" + name.removeprefix("Model")
        code[whole] = f"modeling_deepseek.DeepseekV3{name}"
    config = {**release.config, "auto_map": code}
    names = sorted(config)
    names.remove("rope_scaling")
    names.insert(names.index("routed_scaling_factor") + 1, "rope_scaling")
    text = json.dumps({name: in_order(config[name]) for name in names}, indent=2)
    whose = release.published["config.json"][hashlib.sha256(text.encode()).hexdigest()]
    assert whose == "K2-Instruct fd1984e2, K2-Base ce72df01"


def in_order(value: Any) -> Any:
    return dict(sorted(value.items())) if isinstance(value, dict) else value


@cache
def kimi_k2_tensors() -> Assumed:
    return assumed_tensors(expected("kimi-k2"))


def test_kimi_k2s_tensors_are_as_many_and_as_large_as_published() -> None:
    # The index of K2-Instruct, by two public audits: 139,644 tensors, total_size 1,029,173,256,720,
    # 1,026,408,232,448 weights without scales and buffers.
    tensors = kimi_k2_tensors()
    assert len(tensors.weights) + len(tensors.buffers) == 139_644
    assert tensors.num_bytes + 61 * 2 * 56 == 1_029_173_256_720


def test_a_published_header_of_kimi_k2_follows_from_names_dtypes_and_shapes() -> None:
    """Length of a shard's header and one tensor's place, in the safetensors library's order."""
    # github.com/RohanAdwankar/sploosh, README: the first bytes of model-2-of-61.safetensors.
    release = expected("kimi-k2")
    tensors = kimi_k2_tensors()
    kinds = {**tensors.weights, **dict.fromkeys(tensors.buffers, tensors.buffer)}
    layer = [(name, *kind) for name, kind in kinds.items() if name.startswith("model.layers.1.")]
    layer.sort(key=lambda entry: (-ITEM_BYTES[entry[1]], entry[0]))
    header = encode_header(layer, *release.metadata)
    assert len(header) - 8 == 293_368
    gate = json.loads(header[8:])["model.layers.1.mlp.experts.0.gate_proj.weight"]
    assert gate["data_offsets"] == [24_383_824, 39_063_888]


@pytest.mark.parametrize("preset", RELEASES)
def test_every_release_has_its_own_ids(preset: str) -> None:
    release = expected(preset)
    assert release.num_ranks == 163_584 and release.named["[PAD]"] == 163_839
    assert release.eos_ids == (163_586,)
    assert release.config["bos_token_id"] == release.named["[BOS]"]


def test_a_preset_without_a_release_is_refused() -> None:
    with pytest.raises(ValueError, match="--k2-preset k2-nano: no release of it"):
        expected("k2-nano")


def test_headers_with_other_metadata_are_told(release: Path) -> None:
    shard = min(release.glob("*.safetensors"))
    save_file(load_file(shard), shard, metadata={"format": "tf"})
    assert differing(release) == ["headers: __metadata__"]


def test_buffers_of_unknown_kind_may_have_any_small_size(release: Path) -> None:
    assert differing(release, replace(SMALL, buffer=None)) == []
    edit_json(INDEX, lambda i: i["metadata"].update(total_size=i["metadata"]["total_size"] + 1))(
        release
    )
    assert differing(release, replace(SMALL, buffer=None)) == ["index: total_size (bytes)"]
