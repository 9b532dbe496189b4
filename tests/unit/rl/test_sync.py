"""Weights reach the engine whole, or no rollout begins: in process and by disk."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_k2.checkpoint.names import regions
from megatron_k2.compat import optional
from megatron_k2.engine.base import Request, Sampling
from megatron_k2.rl.sync import disk_writer, versions
from megatron_k2.rl.sync.checkpoint_engine import CheckpointEngineSync
from megatron_k2.rl.sync.disk import DiskSync, write_version
from megatron_k2.rl.sync.disk_writer import DiskWriter
from megatron_k2.rl.sync.fingerprint import Fingerprint, SyncRefused, differences
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.in_process import InProcessSync, copy_
from megatron_k2.rl.sync.live import LivePart, LiveWeights
from megatron_k2.rl.sync.probe import trainer_top
from megatron_k2.rl.sync.sums import partial_sum
from megatron_k2.rl.sync.vllm_native import VLLMNativeSync
from megatron_k2.rl.sync.whole import whole_tensors
from tests.unit.engine.small_models import VOCABULARY, build, prompt_of, randomise_
from tests.unit.rl.sync_setting import CONFIG, SHAPE, Setting, answer, difference, with_setting

pytestmark = pytest.mark.usefixtures("single_process")
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def trainer(single_process: None) -> Any:
    torch.set_num_threads(1)
    return build(seed=1)


@pytest.fixture
def other(trainer: Any) -> Any:
    """A model with other weights, for an engine."""
    return build(seed=2)


def writer_of(model: Any, folder: Path, dtype: str = "F32", **more: Any) -> DiskWriter:
    return DiskWriter(folder, LiveWeights([model], SHAPE, dtype), CONFIG, **more)


def in_process(trainer: Any, setting: Setting) -> InProcessSync:
    live = LiveWeights([trainer], SHAPE, "F32")
    return InProcessSync(live, setting.receiver, setting.gate, VOCABULARY)


@pytest.mark.parametrize("values", [torch.randn(37, 29), torch.randn(41).bfloat16()])
def test_sums_add_over_any_cut_and_see_every_flipped_byte(values: torch.Tensor) -> None:
    def total(tensor: torch.Tensor) -> int:
        return int(partial_sum(tensor, (0,) * tensor.ndim))

    cuts = [values[:11], values[11:]]
    assert total(values) == int(sum(partial_sum(c, (o,) + (0,) * (c.ndim - 1))
                                    for c, o in zip(cuts, (0, 11), strict=True)))  # fmt: skip
    if values.ndim == 2:
        parts = [partial_sum(values[:, :7], (0, 0)), partial_sum(values[:, 7:], (0, 7))]
        assert total(values) == int(sum(parts))
    assert total(values.flip(0)) != total(values)
    for place in range(0, values.nbytes, 17):
        flipped = values.clone()
        flipped.view(torch.uint8).view(-1)[place] ^= 1 << (place % 8)
        assert total(flipped) != total(values)


def test_every_tensor_is_named_router_bias_and_experts_too(trainer: Any) -> None:
    sums = LiveWeights([trainer], SHAPE, "BF16").sums()
    experts = [name for name in sums if ".mlp.experts." in name]
    assert len(experts) == 2 * 7 * 3
    assert sums[BIAS].dtype == "F32" and sums[EXPERT].dtype == "BF16"
    held = sum(one.numel() for one in trainer.parameters())
    held += sum(b.numel() for n, b in trainer.named_buffers() if n.endswith("expert_bias"))
    assert sum(one.num_elements for one in sums.values()) == held


def test_in_process_copy_gives_the_trainers_answers_and_versions(trainer: Any, other: Any) -> None:
    async def use(setting: Setting) -> None:
        with pytest.raises(SyncRefused, match="weights 0 were never compared"):
            await answer(setting.gate)
        assert difference(trainer, await answer(setting.engine)) > 0.01
        agreed = await in_process(trainer, setting).push(3)
        found = await answer(setting.gate)
        assert difference(trainer, found) < 1e-5 and found.versions == [3] * 4
        assert agreed.version == 3 and BIAS in (agreed.tensors or {})

    with_setting(other, use)


def test_the_trainers_own_modules_are_bound_anew_after_a_step(other: Any) -> None:
    async def use(setting: Setting) -> None:
        sync = in_process(other, setting)
        await sync.push(0)
        before = await answer(setting.gate)
        randomise_(other, 3)  # the optimizer's step
        with pytest.raises(SyncRefused, match="own copies are not its model's"):
            await sync.verify()
        with pytest.raises(SyncRefused):
            await answer(setting.gate)
        await sync.push(1)
        after = await answer(setting.gate)
        assert before.versions == [0] * 4 and after.versions == [1] * 4
        assert difference(other, before) > 0.01 and difference(other, after) < 1e-5

    with_setting(other, use)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_disk_sync_gives_the_trainers_answers(
    trainer: Any, other: Any, tmp_path: Path, dtype: str
) -> None:
    writer = writer_of(trainer, tmp_path, dtype, shard_bytes=200_000)

    async def use(setting: Setting) -> None:
        sync = DiskSync(tmp_path, setting.receiver, setting.gate, dtype, writer)
        for version in (4, 5, 6):
            await sync.push(version)
        found = await answer(setting.gate)
        if dtype == "F32":
            assert difference(trainer, found) < 1e-5
        assert found.versions == [6] * 4
        with pytest.raises(ValueError, match="version 6 must be 7 or more"):
            await sync.push(6)
        assert (await answer(setting.gate)).versions == [6] * 4

    with_setting(other, use, dtype)
    assert versions.versions(tmp_path) == [5, 6] and versions.newest(tmp_path) == 6
    assert sorted(one.name for one in tmp_path.iterdir()) == ["LATEST", "v000005", "v000006"]
    assert len(list((tmp_path / "v000006").glob("*.safetensors"))) > 1


def test_a_flipped_byte_on_disk_is_refused_and_the_engine_left_alone(
    trainer: Any, other: Any, tmp_path: Path
) -> None:
    write_version(writer_of(trainer, tmp_path), 2)
    file = tmp_path / "v000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)

    async def use(setting: Setting) -> None:
        before = setting.weights.sums()
        sync = DiskSync(tmp_path, setting.receiver, setting.gate, "F32")
        with pytest.raises(SyncRefused, match=r"model\.layers\.2\..*: checksum"):
            await sync.push(2)
        with pytest.raises(SyncRefused):
            await answer(setting.gate)
        assert setting.weights.sums() == before and setting.engine.weight_version == 0
        data[-5] ^= 4
        file.write_bytes(data)
        config = tmp_path / "v000002" / "config.json"
        config.write_text(config.read_text().replace("1e-06", "1e-05"))
        with pytest.raises(SyncRefused, match=r"config\.json"):
            await sync.push(2)

    with_setting(other, use)


@pytest.mark.parametrize("where", ["parameter", "copy"])
def test_a_flipped_byte_in_the_engines_memory_is_refused_before_the_first_rollout(
    trainer: Any, other: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip_(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.view(torch.uint8).view(-1)[0] ^= 1  # the lowest bit of a mantissa

    async def use(setting: Setting) -> None:
        change = setting.receiver.change

        async def damaged(version: int, load: Any) -> None:
            await change(version, load)
            if where == "copy":
                flip_(setting.core.weights.layers[2].mlp.fc2)  # type: ignore[union-attr]
            else:
                flip_(other.decoder.layers[1].mlp.router.weight)

        monkeypatch.setattr(setting.receiver, "change", damaged)
        words = (
            r"layers\.2\.mlp\.fc2" if where == "copy" else r"model\.layers\.1\.mlp\.gate\.weight"
        )
        sync = in_process(trainer, setting)
        with pytest.raises(SyncRefused, match=words):
            await sync.push(1)
        with pytest.raises(SyncRefused, match=words):
            await answer(setting.gate)
        monkeypatch.setattr(setting.receiver, "change", change)
        await sync.push(1)
        assert (await answer(setting.gate)).versions == [1] * 4

    with_setting(other, use)


def test_tokens_of_an_unconfirmed_version_wait_and_are_refused_with_it(
    trainer: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(setting: Setting) -> None:
        sync = in_process(trainer, setting)
        await sync.push(1)
        seen: list[int] = []

        async def roll_out() -> None:
            asked = Request("long", prompt_of(6), Sampling(100, 0.0))
            async for piece in setting.gate.stream(asked):
                seen.extend(piece.versions)

        task = asyncio.create_task(roll_out())
        while len(seen) < 3:
            await asyncio.sleep(0)
        wrong = Fingerprint(7, {}, ())

        async def mistaken(version: int) -> Fingerprint:
            while setting.core.scheduler.running:  # the request goes on, unseen
                await asyncio.sleep(0.001)
            return wrong

        monkeypatch.setattr(setting.receiver, "fingerprint", mistaken)
        with pytest.raises(SyncRefused, match="the trainer's is 2, the engine's 7"):
            await sync.push(2)
        with pytest.raises(SyncRefused):
            await task
        assert set(seen) == {1}

    with_setting(other, use)


def test_a_load_that_breaks_off_shuts_the_old_version_too(trainer: Any, other: Any) -> None:
    async def use(setting: Setting) -> None:
        sync = in_process(trainer, setting)
        await sync.push(1)
        sync._trainer = LiveWeights([build(moe_ffn_hidden_size=36, q_lora_rank=None)], SHAPE, "F32")
        sync._publish = lambda version: asyncio.sleep(0)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="the trainer has no such tensor"):
            await sync.push(2)
        assert setting.engine.weight_version == 1
        with pytest.raises(SyncRefused, match="the trainer has no such tensor"):
            await answer(setting.gate)

    with_setting(other, use)


def test_rectangles_of_a_tensor_are_written_at_their_places(tmp_path: Path) -> None:
    whole = torch.randn(6, 5).bfloat16()
    region = next(one for one in regions(SHAPE) if len(one.shape) == 2)
    region = replace(region, shape=(6, 5))
    file = tmp_path / "file"
    file.write_bytes(bytes(3 + whole.nbytes))
    handle = os.open(file, os.O_WRONLY)
    for rows, columns in (
        (slice(0, 4), slice(0, 2)),
        (slice(0, 4), slice(2, 5)),
        (slice(4, 6), slice(0, 5)),
    ):
        values = whole[rows, columns].contiguous()
        part = LivePart(region, (rows.start, columns.start), values)
        disk_writer._write_rectangle(handle, 3, part, values)
    os.close(handle)
    assert file.read_bytes()[3:] == whole.view(torch.uint8).numpy().tobytes()


def test_a_missing_or_reshaped_tensor_is_named(trainer: Any, other: Any) -> None:
    narrow = build(moe_ffn_hidden_size=20)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight.* in the trainer.*by disk"):
        copy_([trainer], [narrow])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj.* says"):
        LiveWeights([narrow], SHAPE, "F32").sums()
    shallow = build(num_layers=2, moe_layer_freq=[0, 1])
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* holds 0 of its"):
        LiveWeights([shallow], SHAPE, "F32").sums()
    sums = LiveWeights([trainer], SHAPE, "F32").sums()
    whole = Fingerprint(1, sums, ())
    part = Fingerprint(1, {name: one for name, one in sums.items() if name != BIAS}, ())
    assert differences(whole, part, 0.0) == [f"{BIAS}: the engine has no such tensor"]
    assert Fingerprint.from_json(json.dumps(json.loads(whole.to_json()))) == whole


def test_log_probabilities_see_what_no_checksum_does(trainer: Any, other: Any) -> None:
    async def use(setting: Setting) -> None:
        copy_([trainer], [other])
        other.decoder.final_layernorm.eps = 0.5
        with pytest.raises(SyncRefused, match="log-probability at position 0"):
            await in_process(trainer, setting).push(1)

    with_setting(other, use)


def killed_at(target: str, calls: int) -> None:
    """Have this process killed when the writer calls ``target`` for that time."""
    real, made = getattr(disk_writer, target), itertools.count(1)

    def deadly(*args: Any, **named: Any) -> Any:
        if next(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    setattr(disk_writer, target, deadly)


def test_a_killed_writer_leaves_the_last_version_and_is_cleaned_up(
    trainer: Any, other: Any, tmp_path: Path
) -> None:
    writer = writer_of(trainer, tmp_path)
    top = trainer_top(trainer, VOCABULARY)
    writer.write(1, top)
    for version, target, calls in (
        (2, "_write_at", 20),
        (3, "write_manifest", 1),
        (4, "publish", 1),
    ):
        child = os.fork()
        if child == 0:  # one thread of torch: none is lost by the fork
            killed_at(target, calls)
            try:
                writer.write(version, top)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert (tmp_path / f".v{version:06d}.partial").is_dir()
        assert versions.newest(tmp_path) == 1

    async def use(setting: Setting) -> None:
        sync = DiskSync(tmp_path, setting.receiver, setting.gate, "F32")
        with pytest.raises(SyncRefused, match="no such version"):
            await sync.push(2)
        await sync.push(1)
        assert difference(trainer, await answer(setting.gate)) < 1e-5

    with_setting(other, use)
    writer.write(5, top)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["LATEST", "v000001", "v000005"]


def test_whole_tensors_are_the_files_and_gpu_transports_say_what_to_install(
    trainer: Any, tmp_path: Path
) -> None:
    write_version(writer_of(trainer, tmp_path), 1)
    stored = load_file(tmp_path / "v000001" / "model.safetensors")
    live = LiveWeights([trainer], SHAPE, "F32")
    whole = dict(whole_tensors(live))
    assert whole.keys() == stored.keys()
    assert all(torch.equal(one, stored[name]) for name, one in whole.items())
    nothing: Any = None
    gate = GatedEngine(nothing)
    if not optional("vllm").usable:
        with pytest.raises(ImportError, match="pip install vllm"):
            VLLMNativeSync(live, nothing, gate, ("localhost", 1))
    if not optional("checkpoint_engine").usable:
        with pytest.raises(ImportError, match=r"megatron-k2\[checkpoint-engine\]"):
            CheckpointEngineSync(live, nothing, gate, "http://localhost", 8)
