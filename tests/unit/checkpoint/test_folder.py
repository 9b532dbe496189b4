"""A folder that is not whole, or that points out of itself, is refused before any output exists."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.hf.folder import INDEX, open_folder, read_json
from tests.unit.checkpoint.hf_models import BASE, make_folder
from tests.unit.checkpoint.megatron_side import there

SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
NAME = "model.norm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "hf"))


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *parts: str) -> None:
    """The folder is refused with a message of all parts, and nothing is written."""
    target = folder.parent / "megatron"
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ConversionRefused) as raised:
        conversions.to_megatron(folder, target, Options(), workers=1, quiet=True)
    for part in parts:
        assert part in str(raised.value)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "shard",
    [
        "../hf/model-00001-of-00003.safetensors",
        "/etc/passwd.safetensors",
        "./model-00001-of-00003.safetensors",
        "sub/model-00001-of-00003.safetensors",
        "sub/../model-00001-of-00003.safetensors",
        ".hidden.safetensors",
        "..",
        "",
        "model.bin",
        "a\0b.safetensors",
        "a\nb.safetensors",
        "\udc80.safetensors",
        3,
        None,
        ["model-00001-of-00003.safetensors"],
    ],
)
def test_shard_name_that_is_not_plain_is_refused(folder: Path, shard: Any) -> None:
    (folder / "sub").mkdir()
    (folder.parent / "passwd.safetensors").touch()
    write_index(folder, weight_map(folder) | {NAME: shard})
    refused(folder, INDEX, NAME, "not the plain name")


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    refused(folder, SHARDS[1], "No such file")


def test_stray_shard_is_named(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "model-00004-of-00004.safetensors")
    refused(folder, "model-00004-of-00004.safetensors", "not in model.safetensors.index.json")


def test_tensor_in_two_shards_is_named_with_both(folder: Path) -> None:
    found = weight_map(folder)
    other = next(shard for shard in SHARDS if shard != found[NAME])
    save_file(load_file(folder / other) | {NAME: torch.ones(160).bfloat16()}, folder / other)
    refused(folder, NAME, found[NAME], other)


def test_tensor_in_another_shard_than_the_index_says_is_named(folder: Path) -> None:
    found = weight_map(folder)
    other = next(shard for shard in SHARDS if shard != found[NAME])
    write_index(folder, found | {NAME: other})
    refused(folder, f"{NAME}: the index says {other}, the headers say {found[NAME]}")


def test_tensor_that_is_only_in_the_index_or_only_in_a_header_is_named(folder: Path) -> None:
    found = weight_map(folder)
    del found[NAME]
    write_index(folder, found | {"model.ghost.weight": SHARDS[0]})
    refused(
        folder,
        "model.ghost.weight: the index says model-00001-of-00003.safetensors, the headers say no",
        f"{NAME}: in ",
        "but not in the index",
    )


def test_shard_cut_short_is_named(folder: Path) -> None:
    os.truncate(folder / SHARDS[2], (folder / SHARDS[2]).stat().st_size - 1)
    refused(folder, SHARDS[2], "cut short")


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"weight_map": []}', b"NaN"]
)
def test_unreadable_index_or_configuration_is_named(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    refused(folder, *([name] if text != b'{"weight_map": []}' or name == INDEX else ["config"]))


def test_folder_without_weights_or_configuration_says_so(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConversionRefused, match=r"config\.json: not there"):
        open_folder(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(ConversionRefused, match=r"neither .*index\.json nor model\.safetensors"):
        open_folder(tmp_path / "hf")


def test_links_of_the_hub_cache_are_followed_and_dangling_ones_refused(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):  # snapshots link to blobs
        path.rename(blobs / str(number))
        path.symlink_to(Path("../blobs") / str(number))
    release = there(folder, folder.parent / "linked")
    assert (release / "hf/tiktoken.model").read_bytes() == b"IQ== 0\n"
    assert not (release / "hf/tiktoken.model").is_symlink()
    (blobs / "0").unlink()  # config.json's
    with pytest.raises(ConversionRefused, match=r"config\.json: not there"):
        open_folder(folder)


def test_small_files_leave_out_weights_of_other_formats_and_the_manifest(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", ".gitattributes", intact.MANIFEST):
        (folder / name).write_bytes(b"x")
    (folder / "figures").mkdir()
    (folder / "__init__.py").touch()  # an empty file is carried too
    names = [path.name for path in open_folder(folder).small_files()]
    assert names == ["__init__.py", "config.json", "generation_config.json", "tiktoken.model"]
    release = there(folder, folder.parent / "megatron")
    assert (release / "hf/__init__.py").read_bytes() == b""


def damaged_text(text: str, clock: random.Random) -> str:
    """Return JSON with some characters changed, or with one value replaced."""
    odd = [None, True, -1, 0, 1.5, 1 << 80, "", "x", [], {}, [1], {"a": 1}, "../x", "\ud800"]
    if clock.random() < 0.6:
        value = json.loads(text)
        target = value
        while clock.random() < 0.7 and isinstance(target, dict):
            inner = [entry for entry in target.values() if isinstance(entry, dict)]
            if not inner:
                break
            target = clock.choice(inner)
        name = clock.choice(list(target) or ["x"])
        if clock.random() < 0.2:
            target.pop(name, None)
        else:
            target[name] = clock.choice(odd)
        return json.dumps(value)
    characters = list(text)
    for _ in range(clock.randint(1, 3)):
        place = clock.randrange(len(characters))
        characters[place] = clock.choice(["", '"', "{", "}", ",", "\\", "\0", "é", "9", "/"])
    return "".join(characters)


def test_random_damage_of_the_index_is_refused_or_harmless(folder: Path) -> None:
    clock = random.Random(3)
    text = (folder / INDEX).read_text()
    expected = weight_map(folder)
    refusals = 0
    for case in range(250):
        (folder / INDEX).write_text(damaged_text(text, clock), errors="surrogatepass")
        try:
            found = open_folder(folder)
        except ConversionRefused:
            refusals += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        else:
            assert {name: t.path.name for name, t in found.tensors.items()} == expected
    assert refusals > 100


def planned(folder: Path) -> None:
    conversions.plan(folder, Options())


def of_arguments(folder: Path) -> None:
    arguments_from_config(read_json(folder / "config.json"))


@pytest.mark.parametrize("use", [planned, of_arguments])
def test_random_damage_of_the_configuration_raises_nothing_but_a_refusal(
    folder: Path, use: Callable[[Path], None]
) -> None:
    clock = random.Random(5)
    text = json.dumps(BASE | {"quantization_config": {"quant_method": "fp8"}})
    whole = (folder / "config.json").read_text()
    for case in range(120):
        damaged = damaged_text(clock.choice([text, whole, whole]), clock)
        (folder / "config.json").write_text(damaged, errors="surrogatepass")
        try:
            use(folder)
        except ConversionRefused:
            continue
        except Exception as error:
            raise AssertionError(
                f"case {case}: {damaged}: {type(error).__name__}: {error}"
            ) from error
