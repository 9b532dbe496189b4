"""``--dataloader-inter-document-masking`` in our runner: documents do not see each other."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from tests.distributed.test_stock_script import CHECKOUT, losses, needs_checkout, torchrun
from tests.distributed.trainings import zygote

PACKED = "--dataloader-inter-document-masking"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that name a dataset of documents of 3 to 39 tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("documents") / "short"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    generator = torch.Generator().manual_seed(0)
    for length in torch.randint(3, 40, (400,), generator=generator).tolist():
        tokens = torch.randint(1023, (length,), generator=generator, dtype=torch.int32)
        tokens[-1] = 1023  # the end of a document, NullTokenizer's own
        builder.add_document(tokens, [length])
    builder.finalize(f"{prefix}.idx")
    return [f"--data-path={prefix}", "--split=100,0,0", "--train-iters=3", "--vocab-size=1024"]


@pytest.mark.parametrize("num_stages", [2, pytest.param(4, marks=pytest.mark.evidence)])
def test_packed_documents_train_alike_in_one_process_and_over_stages(
    arguments: list[str], tmp_path: Path, num_stages: int
):
    def run(*more: str, world_size: int = 1) -> dict[int, str]:
        training = zygote().train(*arguments, *more, world_size=world_size)
        assert training.wait() == [0] * world_size, training.output()
        return training.losses()

    plain = run()
    packed = run(PACKED, f"--save={tmp_path}", "--save-interval=1")
    stages = run(
        *(PACKED, f"--load={tmp_path}", "--ckpt-step=1"),
        f"--pipeline-model-parallel-size={num_stages}",
        world_size=num_stages,
    )
    assert sorted(packed) == [1, 2, 3]
    assert packed[1] != plain[1]
    found, wanted = (
        [[float.fromhex(value) for value in curve[step].split()] for step in (2, 3)]
        for curve in (stages, packed)
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_packed_microbatches_of_several_rows_are_refused_over_stages(arguments: list[str]):
    layout = ("--pipeline-model-parallel-size=2", "--micro-batch-size=2")
    training = zygote().train(*arguments, PACKED, *layout)
    assert training.wait() == [2, 2], training.output()
    assert "error: --micro-batch-size 2: with --dataloader-inter-document" in training.output()


@needs_checkout
def test_packed_documents_train_as_with_the_stock_script(arguments: list[str]):
    arguments = [
        *("--k2-preset=k2-micro", "--k2-device=cpu", "--lr=1e-3", "--tokenizer-type=NullTokenizer"),
        *("--seq-length=64", "--micro-batch-size=2", "--global-batch-size=4", "--log-interval=1"),
        *("--eval-iters=0", *arguments, PACKED),
    ]
    script = str(Path(str(CHECKOUT)) / "pretrain_gpt.py")
    stock = losses(torchrun("-m", "megatron_k2", script, *arguments, processes=1))
    ours = losses(torchrun("-m", "megatron_k2.training.pretrain", *arguments, processes=1))
    assert len(ours) == 3
    assert ours == stock
