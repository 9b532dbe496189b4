"""Adapters in PEFT's format: read into a model, and added to the bytes of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_k2.adapters import is_adapter
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.load_hf import LoadHF
from megatron_k2.checkpoint.load_peft import LoadPeft
from megatron_k2.checkpoint.merge import merge
from tests.unit.checkpoint.hf_models import BASE, FP8, quantised, tensors_of, write_folder
from tests.unit.checkpoint.megatron_side import SMALL

pytestmark = pytest.mark.usefixtures("single_process")
RANK, ALPHA = 2, 5.0
CONFIG: dict[str, Any] = BASE | SMALL


def model_of(folder: Path, **fields: Any) -> Any:
    """Return the folder's model, fp32."""
    from megatron_k2.model.config import config_from_arguments
    from tests.unit.model.tiny import build_model

    transformer = config_from_arguments(
        arguments_from_config(CONFIG) | {"mtp_num_layers": None}, params_dtype=torch.float32,
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall", **fields,
    )  # fmt: skip
    model = build_model(transformer, CONFIG["vocab_size"])
    LoadHF(folder)([model])
    return model


def adapted(folder: Path, **fields: Any) -> Any:
    """Return it with adapters."""
    return model_of(folder, **{"k2_lora_rank": RANK, "k2_lora_alpha": ALPHA} | fields)


def randomise_(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


_NAMES = {
    "self_attention.linear_q_down_proj": ["self_attn.q_a_proj"],
    "self_attention.linear_q_up_proj": ["self_attn.q_b_proj"],
    "self_attention.linear_q_proj": ["self_attn.q_proj"],
    "self_attention.linear_kv_down_proj": ["self_attn.kv_a_proj_with_mqa"],
    "self_attention.linear_kv_up_proj": ["self_attn.kv_b_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
}
for _place in ("mlp", "mlp.shared_experts", "mlp.experts"):
    _inside = _place + (".{}" if _place == "mlp.experts" else "")
    _NAMES[f"{_place}.linear_fc1"] = [f"{_inside}.gate_proj", f"{_inside}.up_proj"]
    _NAMES[f"{_place}.linear_fc2"] = [f"{_inside}.down_proj"]


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """Return the model's adapters by PEFT's names, written down here once more."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            continue
        _, _, layer, rest = name.split(".", 3)
        place, _, factor = rest.rpartition(".")
        stack = parameter.detach() if parameter.ndim == 3 else parameter.detach()[None]
        for expert, matrix in enumerate(stack):
            leaves = _NAMES[place]
            parts = matrix.chunk(len(leaves)) if factor == "lora_B" else [matrix] * len(leaves)
            for leaf, part in zip(leaves, parts, strict=True):
                module = f"base_model.model.model.layers.{layer}.{leaf.format(expert)}"
                found[f"{module}.{factor}.weight"] = part.clone()
    return found


def write_peft(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, bias="none", target_modules=["x"])
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def loss_of(model: Any) -> Tensor:
    tokens = torch.randint(
        CONFIG["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(5)
    )
    positions = torch.arange(16).expand(2, 16)
    loss: Tensor = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    return loss


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    return write_folder(folder, CONFIG, tensors_of(CONFIG, torch.float32))


def bytes_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[name] = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("targets", [None, ["kv_b_proj", "experts"]], ids=["all", "some"])
def test_merged_folder_is_the_adapted_model_and_the_rest_keeps_its_bytes(
    base: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    model = adapted(base, k2_lora_targets=targets)
    randomise_(model)
    adapter = write_peft(tmp_path / "adapter", tensors := peft_tensors(model))
    changed, kept = merge(base, adapter, tmp_path / "merged")
    before, after = bytes_of(base), bytes_of(tmp_path / "merged")
    touched = {
        name.removeprefix("base_model.model.").replace(".lora_A", "")
        for name in tensors
        if ".lora_A." in name
    }
    assert {name for name in before if before[name] != after[name]} == touched
    assert (changed, kept) == (len(touched), len(before) - len(touched))
    found, wanted = loss_of(model_of(tmp_path / "merged")), loss_of(model)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    assert abs(wanted - loss_of(model_of(base))) > 1e-3


def test_adapters_are_read_into_a_model_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model, other = adapted(base), adapted(base)
    randomise_(model)
    adapter = write_peft(tmp_path / "adapter", peft_tensors(model))
    LoadPeft(adapter, arguments_from_config(CONFIG))([other])
    wanted = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_fp8_weights_are_merged_in_blocks_with_fresh_scales(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": FP8}
    folder = write_folder(tmp_path / "hf", config, quantised(tensors_of(CONFIG)))
    model = adapted(folder, k2_lora_targets=["o_proj", "down_proj"])
    randomise_(model)
    adapter = write_peft(tmp_path / "adapter", peft_tensors(model))
    changed, _ = merge(folder, adapter, tmp_path / "merged")
    before, after = bytes_of(folder), bytes_of(tmp_path / "merged")
    touched = {name for name in before if before[name] != after[name]}
    assert touched and all("o_proj" in name or "down_proj" in name for name in touched)
    assert changed >= len(touched)
    merged = dict(model_of(tmp_path / "merged").named_parameters())
    own = dict(model.named_parameters())
    for name, up in own.items():
        if name.endswith("lora_B"):
            place = name.removesuffix("lora_B")
            wanted = own[place + "weight"] + ALPHA / RANK * up @ own[place + "lora_A"]
            error = (merged[place + "weight"] - wanted).abs().max() / wanted.abs().max()
            assert error <= 2.0**-4 + 2.0**-8, name  # half a step of 3 mantissa bits, and bf16


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (None, dict(r=3), r"adapter_config.json says r=3"),
        (None, dict(use_dora=True), "use_dora: True"),
        ("twin", {}, "differs from .*gate_proj"),
        ("stranger", {}, "not of this model"),
        ("half", {}, "its other factor is missing"),
        ("absent", {}, "has nothing for decoder.layers.0.self_attention.linear_proj.lora_A"),
        (None, dict(lora_alpha=1), "give --k2-lora-rank 2 --k2-lora-alpha 1"),
    ],
)
def test_adapters_of_something_else_are_refused(
    base: Path, tmp_path: Path, edit: str | None, changes: dict[str, Any], message: str
) -> None:
    model = adapted(base)
    tensors = peft_tensors(model)
    first = "base_model.model.model.layers.0."
    if edit == "twin":
        tensors[f"{first}mlp.up_proj.lora_A.weight"] += 1
    elif edit == "stranger":
        for factor in "AB":
            one = tensors[f"{first}mlp.up_proj.lora_{factor}.weight"]
            tensors[f"{first}mlp.other.lora_{factor}.weight"] = one.clone()
    elif edit in ("half", "absent"):
        for factor in "A" if edit == "half" else "AB":
            del tensors[f"{first}self_attn.o_proj.lora_{factor}.weight"]
    adapter = write_peft(tmp_path / "adapter", tensors, **changes)
    with pytest.raises(ConversionRefused, match=message):
        LoadPeft(adapter, arguments_from_config(CONFIG))([model])


def test_merge_refuses_another_base_before_it_copies(base: Path, tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.model.layers.0.self_attn.o_proj.lora_{factor}.weight": torch.zeros(shape)
        for factor, shape in (("A", (RANK, 7)), ("B", (9, RANK)))
    }
    adapter = write_peft(tmp_path / "adapter", tensors)
    with pytest.raises(ConversionRefused, match="the adapter's is"):
        merge(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
