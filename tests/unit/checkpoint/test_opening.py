"""What transformers finds in an export of a kimi_k2 release: every tensor, or a note that says how.

transformers chooses by model_type whether it merges experts; a tensor that it does not find it
initialises at random, with no more than a warning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_k2.checkpoint.hf.folder import read_json
from megatron_k2.checkpoint.hf.small_files import HOW_TO_OPEN, opening_note
from megatron_k2.training import convert
from tests.unit.checkpoint.megatron_side import back, load_shards, make_small, there
from tests.unit.checkpoint.test_int4_groups import wrapped_folder

CODE = dict(
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
)


def assert_holds_all(model: Any, info: dict[str, Any], folder: Path) -> None:
    """The model has every tensor of the folder, an expert's among them, and no other."""
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    stored = load_shards(folder)["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[3].float(), stored.float())


def by_auto_class(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_configuration_that_is_written_anew_is_one_that_transformers_knows(tmp_path: Path) -> None:
    release = there(make_small(tmp_path / "hf", fp8=True, **CODE), tmp_path / "m")
    out = back(release, tmp_path / "out", weights="bf16")
    assert_holds_all(*by_auto_class(out), out)
    given, made = read_json(tmp_path / "hf/config.json"), read_json(out / "config.json")
    assert made == {
        name: value
        for name, value in (given | {"model_type": "deepseek_v3"}).items()
        if name != "quantization_config"
    }
    assert opening_note(out) == ""


def test_int4_release_in_a_wrapper_is_exported_for_transformers(tmp_path: Path) -> None:
    source, _, _ = wrapped_folder(tmp_path / "hf")
    out = back(there(source, tmp_path / "m"), tmp_path / "out")
    assert_holds_all(*by_auto_class(out), out)


@pytest.mark.parametrize("like", [False, True], ids=["again", "like"])
def test_releases_own_configuration_comes_with_the_lines_that_open_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], like: bool
) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    source, out = make_small(tmp_path / "hf", **CODE), tmp_path / "out"
    there(source, tmp_path / "m")
    command = ["to-hf", str(tmp_path / "m"), str(out), "--quiet", "--workers=1"]
    assert convert.main(command + ["--like", str(source)] * like) == 0
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    lines = HOW_TO_OPEN.format(folder=str(out))
    assert capsys.readouterr().out.endswith(lines + "\n")
    found: dict[str, Any] = {
        "DeepseekV3Config": DeepseekV3Config,
        "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    }
    exec(lines.replace("config=config", "config=config, output_loading_info=True"), found)
    assert_holds_all(*found["model"], out)


def test_readme_shows_those_lines() -> None:
    readme = Path(convert.__file__).parents[1] / "checkpoint" / "README.md"
    for line in HOW_TO_OPEN.format(folder="FOLDER").splitlines():
        assert line.replace("'", "") in readme.read_text().replace("'", ""), line


def test_a_folder_of_deepseek_v3_needs_no_note(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    assert opening_note(tmp_path) == ""
