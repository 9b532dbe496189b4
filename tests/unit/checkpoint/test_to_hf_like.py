"""A trained checkpoint in the shape of another folder: what is taken from it, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.source import open_source
from tests.distributed.test_conversion import plain
from tests.unit.checkpoint.hf_models import BASE
from tests.unit.checkpoint.megatron_side import SMALL, back, load_release, load_shards, there
from tests.unit.checkpoint.test_to_hf import make


def trained(root: Path, **changes: Any) -> Path:
    """Return a release without what is kept beside it, as training leaves it."""
    source = make(root / "trained-hf", SMALL | changes, dict, fp8=False)
    release = there(source, root / "trained")
    shutil.rmtree(release / "hf")
    return release


def test_shards_and_small_files_are_the_patterns(tmp_path: Path) -> None:
    like = make(tmp_path / "like", SMALL | dict(vocab_size=101), dict, fp8=True)
    out = back(trained(tmp_path), tmp_path / "out", weights="fp8", like=like)
    for name in ("config.json", "tiktoken.model", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (like / name).read_bytes()
    for shard in like.glob("*.safetensors"):
        size = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert (out / shard.name).read_bytes()[:size] == shard.read_bytes()[:size]


def test_prediction_layers_that_were_not_trained_are_left_out(tmp_path: Path) -> None:
    changes = SMALL | dict(num_nextn_predict_layers=1)
    like = make(tmp_path / "like", changes, dict, fp8=False, num_shards=1)
    own = {n: t for n, t in load_shards(like).items() if n.startswith("model.layers.2.")}
    rest = {n: t for n, t in load_shards(like).items() if n not in own}
    (old,) = like.glob("*.safetensors")
    old.unlink()
    weight_map = {}
    for number, part in enumerate((rest, own)):  # DeepSeek-V3's have a shard of their own
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({n: t.clone() for n, t in part.items()}, like / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (like / "model.safetensors.index.json").write_text(json.dumps(index))
    out = back(trained(tmp_path), tmp_path / "out", like=like)
    assert load_shards(out).keys() == rest.keys()
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    open_source(out)  # no shard is left that the index does not name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(num_attention_heads=8, num_key_value_heads=8, qk_nope_head_dim=4, v_head_dim=10),
            "num_attention_heads: 4 in the checkpoint",
        ),
        (dict(rope_theta=10000.0), "rotary_base: 50000 in the checkpoint"),
        (dict(num_experts_per_tok=3), "moe_router_topk: 2 in the checkpoint"),
        (dict(routed_scaling_factor=2.5), "moe_router_topk_scaling_factor: 1.7"),
        (dict(rms_norm_eps=1e-5), "layernorm_epsilon: 1e-06 in the checkpoint"),
        (dict(rope_scaling=None), "rope_type: 'yarn' in the checkpoint"),
        (dict(rope_scaling=BASE["rope_scaling"] | dict(factor=32.0)), "rotary_scaling_factor"),
        (dict(vocab_size=102), "the configuration says (102, 64)"),
        (dict(num_hidden_layers=3), "model.layers.2"),
    ],
)
def test_pattern_of_another_function_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    like = make(tmp_path / "like", SMALL | changes, dict, fp8=False)
    with pytest.raises(ConversionRefused) as raised:
        back(trained(tmp_path), tmp_path / "out", like=like)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_original_scales_that_a_trained_weight_outgrew_are_refused_by_its_name(
    tmp_path: Path,
) -> None:
    like = make(tmp_path / "like", SMALL, dict, fp8=True)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def grown(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        values = plain(load_shards(like))
        return values | {name: values[name] * 4}

    release = there(make(tmp_path / "hf", SMALL, grown, fp8=False), tmp_path / "m")
    shutil.rmtree(release / "hf")
    options: dict[str, Any] = dict(weights="fp8", like=like)
    with pytest.raises(ConversionRefused, match=f"{name}: .* --scales fresh"):
        back(release, tmp_path / "out", scales="original", **options)
    assert not (tmp_path / "out").exists()
    found = plain(load_shards(back(release, tmp_path / "fresh", scales="fresh", **options)))
    expected = load_shards(tmp_path / "hf")[name].float()
    assert (found[name].float() - expected).abs().max() <= expected.abs().max() / 25


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    release = trained(tmp_path)
    like = make(tmp_path / "like", SMALL, dict, fp8=False)
    for options, message in (
        (dict(scales="original"), "needs --weights fp8"),
        (dict(scales="original", weights="fp8", like=like), "a --like that is FP8"),
        (dict(like=like, vocab_size=100), "--vocab-size says 100"),
        (dict(like=tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(ConversionRefused, match=message):
            back(release, tmp_path / "out", **options)
    assert len(load_release(release)) > 20
