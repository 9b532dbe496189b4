"""An export in vLLM on the CPU: `make test-vllm`. Our engine over HTTP asks, transformers checks.

vLLM's attention for MLA on a CPU knows Kimi K2's own latent of 512 + 64 numbers only, and bf16 only
with experts; so the model is a small one with K2's true head sizes. Products in bf16 on one side,
fp32 on the other: log-probabilities agree to what bf16 has, 8 bits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from megatron_k2.engine.base import Completion, Request, Sampling, generate
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.training.launch import free_port, run_module
from tests.unit.chat.kimi_files import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_S = 600
TOLERANCE_NATS = 0.06  # logits of some 6 in 8 bits, and the error of several layers; 0.032 was seen
PROMPT = tuple(range(100, 140))
HEADS = ("--kv-lora-rank", "512", "--qk-head-dim", "128", "--qk-pos-emb-head-dim", "64")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a few steps, so that nothing is uniform, and export."""
    folder = tmp_path_factory.mktemp("export")
    write_tokenizer(folder / "kimi")
    arguments = [
        *("--k2-preset", "k2-micro", *HEADS, "--v-head-dim", "128", "--k2-device", "cpu"),
        *("--tokenizer-type", "KimiTiktokenTokenizer", "--tokenizer-model", str(folder / "kimi")),
        *("--vocab-size", "692", "--mock-data", "--seq-length", "64", "--micro-batch-size", "4"),
        *("--global-batch-size", "4", "--train-iters", "20", "--lr", "3e-3", "--eval-iters", "0"),
        *("--save", str(folder / "trained"), "--save-interval", "20", "--num-workers", "0"),
        "--use-distributed-optimizer",
    ]
    run_module("megatron_k2.training.pretrain", arguments, folder / "train.log", 1)
    tool = ROOT / "tools" / "convert_checkpoint.py"
    command = [sys.executable, str(tool), "to-hf", str(folder / "trained"), str(folder / "hf")]
    subprocess.run(command, check=True)
    return folder / "hf"


@pytest.fixture(scope="module")
def url(export: Path) -> Iterator[str]:
    """Serve the export by vLLM."""
    port = free_port()
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(export)),
        *("--skip-tokenizer-init", "--dtype", "bfloat16", "--max-model-len", "256"),
        *("--port", str(port), "--served-model-name", "k2", "--max-logprobs", "5"),
        *("--gpu-memory-utilization", "0.2", "--enforce-eager"),  # of the host's memory
    ]
    log = export.parent / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answer(url: str, sampling: Sampling) -> Completion:
    """Return vLLM's answer to the prompt."""

    async def ask() -> Completion:
        engine = await OpenAIEngine.connect(url)
        try:
            return await generate(engine, Request("r", PROMPT, sampling))
        finally:
            await engine.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "sampling", [Sampling(24, temperature=0.0), Sampling(24, seed=3, top_log_probs=3)]
)
def test_vllms_log_probabilities_are_the_exports(
    export: Path, url: str, sampling: Sampling
) -> None:
    import transformers

    found = answer(url, sampling)
    assert len(found.ids) == 24 and found.finish_reason == "length"
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *found.ids]])).logits[0].float()
    wanted = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
    said = torch.tensor(found.log_probs)
    ours = wanted.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
    torch.testing.assert_close(said, ours, rtol=0, atol=TOLERANCE_NATS)
