"""A check of upstream's that fails becomes one line with the flags and their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.upstream_errors import explain


def caught(source: str, folder: Path, name: str = "megatron/training/arguments.py") -> Any:
    """Run a function of a file of that name and return what it raises."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    scope: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), scope)
    with pytest.raises(BaseException) as error:
        scope["validate"](argparse.Namespace(hidden_size=128, num_attention_heads=3))
    return error.value


def test_a_bare_assert_names_the_flags_of_its_condition_and_their_values(tmp_path: Path):
    condition = "args.hidden_size % \\\n        args.num_attention_heads == 0"
    error = caught(f"def validate(args):\n    assert {condition}\n", tmp_path)
    line = explain(error)
    assert line is not None
    assert "`args.hidden_size % \\ args.num_attention_heads == 0` does not hold" in line
    assert "found --hidden-size 128, --num-attention-heads 3" in line
    assert line.endswith("(Megatron, training/arguments.py:2)")


def test_a_message_of_several_lines_becomes_one(tmp_path: Path):
    error = caught("def validate(args):\n    raise ValueError('a\\n  b')\n", tmp_path)
    assert explain(error) == "a b (Megatron, training/arguments.py:2)"


def test_errors_from_elsewhere_keep_their_traceback(tmp_path: Path):
    assert explain(caught("def validate(args):\n    assert False\n", tmp_path, "model.py")) is None
    source = "def validate(args):\n    raise KeyboardInterrupt\n"
    assert explain(caught(source, tmp_path)) is None


def test_our_own_value_errors_are_passed_on(tmp_path: Path):
    source = "def validate(args):\n    raise ValueError('--flag 1 is wrong')\n"
    assert explain(caught(source, tmp_path, "megatron_k2/model/x.py")) == "--flag 1 is wrong"


def test_another_optimizers_checkpoint_is_named_with_the_flag_that_helps() -> None:
    message = explain(
        KeyError(
            "optimizer.state.momentum_buffer.decoder.x.weight from model not in state dict: []"
        )
    )
    assert message is not None
    assert "'momentum_buffer'" in message and "--no-load-optim" in message
    assert explain(KeyError("something else")) is None


def test_modules_to_recompute_are_listed_with_our_own(tmp_path: Path) -> None:
    text = "Invalid choices for recompute_modules: x. Allowed modules are: y"
    source = f"def validate(args):\n    assert False, {text!r}\n"
    error = caught(source, tmp_path, "megatron/core/transformer/transformer_config.py")
    assert f"{text}, and K2's 'moe_down_proj' (" in str(explain(error))


def test_a_process_that_no_launcher_started_is_told_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR") as raised:
        next(iter(torch.distributed.rendezvous("env://", rank=0, world_size=1)))
    line = explain(raised.value)
    assert line is not None and "put `torchrun --nproc-per-node 1 -m` in the place of" in line
