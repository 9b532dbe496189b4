"""Update rules by name, and one of a user's own in one small file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.directions import Orthogonaliser
from megatron_k2.optimizer.matrices import Rule
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
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_rule("no_such_module:rule")
