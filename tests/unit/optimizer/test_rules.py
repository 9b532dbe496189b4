"""Update rules by name, and one of a user's own in one small file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_k2.optimizer import matrices
from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.directions import Orthogonaliser
from megatron_k2.optimizer.matrices import Rule, assign, declared_matrices, kimi_rules
from megatron_k2.optimizer.muonclip import MuonClip
from megatron_k2.optimizer.rules import load_rule, register_rule

SIGN = """
from megatron_k2.optimizer.rules import register_rule

@register_rule("sign")
class Sign:
    def __init__(self, config): pass
    def __call__(self, momenta): return momenta.sign()
    def scale(self, rows, columns): return 0.5
    def flops(self, rows, columns): return rows * columns
"""


LAYERS = """
from megatron_k2.optimizer.matrices import Rule, declare_matrices

declare_matrices(Rule("*.my_gate.weight", "muon", why="gate of mine"))
"""


def test_a_rule_of_ones_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sign.py").write_text(SIGN)
    monkeypatch.syspath_prepend(tmp_path)
    config = MuonClipConfig(lr=0.1, k2_muon_rule="my_sign:sign")
    weight = torch.zeros(3, 5, requires_grad=True)
    optimizer = MuonClip.for_model(
        [("w", weight)], [Rule("w", "muon")], lr=0.1, rule=config.update_rule()
    )
    weight.grad = torch.randn(3, 5)
    optimizer.step()
    assert torch.equal(weight.detach(), -0.05 * weight.grad.sign())
    del sys.modules["my_sign"]


def test_muons_own_rule_follows_upstreams_fields() -> None:
    rule = MuonClipConfig().update_rule()
    assert isinstance(rule, Orthogonaliser)
    assert len(rule.coefficients) == 5 and rule.compute_dtype == torch.bfloat16
    assert rule.scale(4, 9) == pytest.approx(0.6)
    rule = MuonClipConfig(
        muon_coefficient_type="deepseekv4", muon_fp32_matmul_prec="high",
        muon_extra_scale_factor=1.0, muon_scale_mode="unit_rms_norm",
    ).update_rule()  # fmt: skip
    assert isinstance(rule, Orthogonaliser)
    assert len(rule.coefficients) == 10 and rule.compute_dtype == torch.float32
    assert rule.scale(4, 9) == pytest.approx(2 / 3) and rule.scale(9, 4) == pytest.approx(1.5)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'lion' is not one of .*muon"):
        load_rule("lion")
    with pytest.raises(ValueError, match="'muon' is registered already"):
        register_rule("muon")(Orthogonaliser)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--muon-scale-mode 'cubic'"):
        MuonClipConfig(muon_scale_mode="cubic").update_rule()
    with pytest.raises(
        ValueError, match=r"no module 'no_such_module'; is its folder in PYTHONPATH"
    ):
        load_rule("no_such_module:rule")
    with pytest.raises(ValueError, match=r"--muon-extra-scale-factor -1.0 must be above 0"):
        MuonClipConfig(muon_extra_scale_factor=-1.0).update_rule()
    with pytest.raises(ValueError, match="--k2-muon-backend 'cutlass' is not one of"):
        MuonClipConfig(k2_muon_backend="cutlass").update_rule()


def test_an_error_inside_a_users_module_keeps_its_own_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_broken.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_rule("my_broken:rule")


def test_a_users_module_declares_its_layers_matrices_and_keeps_muons_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_DECLARED", [])
    (tmp_path / "my_layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"my_gate.weight \[4, 8\] is: .*--k2-muon-rule MODULE:muon"
    ):
        assign("decoder.my_gate.weight", (4, 8), kimi_rules(1, 1, 1))
    rule = MuonClipConfig(k2_muon_rule="my_layers:muon").update_rule()
    assert isinstance(rule, Orthogonaliser)
    rules = (*declared_matrices(), *kimi_rules(1, 1, 1))
    assert assign("decoder.my_gate.weight", (4, 8), rules).matrices == ((1, 4, 8),)
    del sys.modules["my_layers"]


def test_upstreams_configuration_takes_kimis_muon_and_keeps_what_was_chosen() -> None:
    config = MuonClipConfig.from_upstream(
        OptimizerConfig(optimizer="muonclip", lr=0.3, weight_decay=0.01, muon_momentum=0.9)
    )
    assert (config.muon_coefficient_type, config.muon_extra_scale_factor) == ("kimi", 0.2)
    assert config.muon_nesterov and config.muon_num_ns_steps is None
    assert (config.lr, config.weight_decay, config.muon_momentum) == (0.3, 0.01, 0.9)
    assert config.qk_clip_threshold == 100.0 and config.optimizer == "muonclip"
