"""What context parallelism cannot do is refused in one line that names the flag."""

from __future__ import annotations

import pytest

from megatron_k2.inputs import UsageError
from megatron_k2.layouts import Layout, validate_layout
from tests.unit.test_arguments import validated

CONTEXT = ["--k2-preset", "k2-micro", "--seq-length", "64", "--context-parallel-size", "2"]


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_latents_are_what_ranks_exchange_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, *CONTEXT)
    assert args.k2_context_exchange == "latent"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seq-length", "66"], "--seq-length 66 must be a multiple of 4: --context-parallel-s"),
        (["--k2-context-exchange", "expanded"], "needs --transformer-impl transformer_engine, or"),
        (["--cp-comm-type", "a2a"], "--cp-comm-type a2a .* add --k2-context-exchange expanded"),
        (["--dataloader-inter-document-masking"], "--micro-batch-size 2: .* it must be 1"),
        (["--context-parallel-size", "3", "--seq-length", "66"], "a multiple of 3 processes"),
    ],
)
def test_impossible_context_parallelism_is_refused(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        validated(monkeypatch, *CONTEXT, *argv)


def test_without_latent_attention_the_host_has_no_context_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = ["--num-layers", "2", "--hidden-size", "64", "--seq-length", "64"]
    with pytest.raises(UsageError, match="or --multi-latent-attention and --k2-context-exchange"):
        validated(monkeypatch, *plain, "--context-parallel-size", "2")


def test_a_ranks_tokens_must_divide_over_tensor_parallelism() -> None:
    layout = dict(world_size=8, context_parallel_size=2, tensor_model_parallel_size=4)
    layout |= dict(sequence_parallel=True)
    validate_layout(Layout(**layout, seq_length=64))
    message = "--seq-length 4 must be a multiple of 8: --context-parallel-size 2 leaves 2 tokens"
    with pytest.raises(ValueError, match=message):
        validate_layout(Layout(**layout, seq_length=4))
