"""Conversion of a K2-shaped FP8 checkpoint to ``torch_dist``: time, memory, the disk's own speed.

``.venv/bin/python tools/bench/convert.py`` makes a folder of Kimi K2's widths with few experts and
a small vocabulary (``--experts``; 48 give 2.9 billion weights), measures the disk, converts, and
measures it again. Peers in the same run, each in a process of its own, page cache dropped before
each: *block loop*, the usual script (DeepSeek-V3's ``fp8_cast_bf16.py``, Megatron-Bridge): load a
file, dequantise its blocks in a Python loop, save it; *torch DCP*:
``QuantizedHuggingFaceStorageReader`` into memory, then ``torch.distributed.checkpoint.save``, all
stock. Everyone's bytes are on the disk when its time ends. Bars: 2.5 CPU-seconds a billion
weights, 600 MB of memory at two workers, 60 % of the floor, 7x and 5x the peers. On a disk slower
than the work, wall times tell about the disk (``--folder /dev/shm`` takes it away; the floor is
then that of memory) and CPU time tells about the converters.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import print_json, print_table

K2_WEIGHTS = 1_026.41e9
K2_READ_BYTES, K2_WRITTEN_BYTES = 1.03e12, 2.06e12
CONFIG: dict[str, Any] = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="kimi_k2", hidden_size=7168,
    num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=18432,
    moe_intermediate_size=2048, num_experts_per_tok=8, n_shared_experts=1,
    num_attention_heads=64, num_key_value_heads=64, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=8192, hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=50000.0, max_position_embeddings=131072, scoring_func="sigmoid",
    topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.827,
    tie_word_embeddings=False, num_nextn_predict_layers=0, torch_dtype="bfloat16",
    quantization_config=dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]
    ),
)  # fmt: skip
SHARDS = 4
CHUNK_BYTES = 16 << 20
DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Run:
    """What one process, with its children, took."""

    wall_s: float
    cpu_s: float
    rss_anon_bytes: int


def make_checkpoint(folder: Path, experts: int) -> int:
    """Write the folder; return its number of weights."""
    from megatron_k2.checkpoint.fp8_blocks import num_blocks
    from megatron_k2.checkpoint.hf.model import shape_from_config
    from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES, encode_header
    from megatron_k2.checkpoint.names import regions
    from megatron_k2.checkpoint.to_hf import is_linear

    config = CONFIG | {"n_routed_experts": experts}
    wanted = list(regions(shape_from_config(config)))
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(SHARDS)]
    for number, region in enumerate(wanted):
        shard = shards[number * SHARDS // len(wanted)]
        is_fp8 = is_linear(region.name, region.shape)
        dtype = "F8_E4M3" if is_fp8 else "F32" if region.fp32 else "BF16"
        shard.append((region.name, dtype, region.shape))
        if is_fp8:
            shard.append((region.name + "_scale_inv", "F32", num_blocks(region.shape)))
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, 64 << 20, dtype=np.uint8)
    noise[(noise & 0x7F) == 0x7F] = 0x21  # no NaN
    weight_map = {}
    for number, entries in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(encode_header(entries, {"format": "pt"}))
            for tensor, dtype, shape in entries:
                weight_map[tensor] = name
                num_items = int(np.prod(shape))
                if dtype == "F32":
                    values = generator.random(num_items, dtype=np.float32) * 1e-3 + 1e-4
                    file.write(values.tobytes())
                    continue
                left = num_items * ITEM_BYTES[dtype]
                source = noise if dtype == "F8_E4M3" else noise & 0x3F  # bf16 below 2
                while left:
                    file.write(memoryview(source)[: min(left, len(source))])
                    left -= min(left, len(source))
            file.flush()
            os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(int(np.prod(region.shape)) for region in wanted)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Return bytes a second of sequential direct reads and writes, best of three."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    buffer.write(os.urandom(CHUNK_BYTES))
    path = folder / "rate"
    best = [0.0, 0.0]
    for _ in range(3):
        for which, flags in ((1, os.O_WRONLY | os.O_CREAT), (0, os.O_RDONLY)):
            descriptor = _open_direct(path, flags)
            began = time.monotonic()
            for offset in range(0, DISK_BYTES, CHUNK_BYTES):
                if which:
                    os.pwrite(descriptor, buffer, offset)
                else:
                    os.preadv(descriptor, [buffer], offset)
            os.fsync(descriptor)
            best[which] = max(best[which], DISK_BYTES / (time.monotonic() - began))
            os.close(descriptor)
    path.unlink()
    return best[0], best[1]


def _open_direct(path: Path, flags: int) -> int:
    """Open past the page cache where the file system can."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)


def measure(command: list[str], source: Path) -> Run:
    """Run a command with the source out of the page cache; watch its processes' memory."""
    for path in source.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], _anonymous_bytes(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    wall = time.monotonic() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command}: {errors.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, peak[0])


def _anonymous_bytes(root: int) -> int:
    """Return the memory of a process and of its children that no file backs, summed."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1]) * 1024
    return total


def block_loop(source: Path, target: Path) -> None:
    """Peer: whole files, a Python loop over blocks, bf16 files."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        found = {}
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                continue
            if tensor.dtype == torch.float8_e4m3fn:
                scales = tensors[name + "_scale_inv"]
                wide = tensor.to(torch.float32)
                for row in range(scales.shape[0]):
                    for column in range(scales.shape[1]):
                        rows = slice(row * 128, row * 128 + 128)
                        columns = slice(column * 128, column * 128 + 128)
                        wide[rows, columns] *= scales[row, column]
                tensor = wide.to(torch.bfloat16)
            found[name] = tensor
        save_file(found, target / path.name)
    os.sync()


def torch_dcp(source: Path, target: Path) -> None:
    """Peer: torch's quantised reader, then its distributed checkpoint, all stock."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    torch.set_num_threads(1)
    reader = QuantizedHuggingFaceStorageReader(str(source), target_dtype=torch.bfloat16)
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(
            entry.size,
            dtype=torch.float32 if entry.properties.dtype == torch.float32 else torch.bfloat16,
        )
        for name, entry in metadata.items()
        if not name.endswith("_scale_inv")
    }
    reader = QuantizedHuggingFaceStorageReader(str(source), target_dtype=torch.bfloat16)
    dcp.load(state, storage_reader=reader)
    dcp.save(state, checkpoint_id=str(target))
    os.sync()


PEERS = {"block-loop": block_loop, "torch-dcp": torch_dcp}


def main() -> None:
    """Make the checkpoint, run all contestants, print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the best counts")
    parser.add_argument("--folder", type=Path, help="scratch, 15 GB; default: the system's")
    parser.add_argument("--peer", nargs=3, metavar=("NAME", "FROM", "TO"), help="run one peer")
    options = parser.parse_args()
    if options.peer:
        name, source, target = options.peer
        PEERS[name](Path(source), Path(target))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        compare(Path(scratch), options)


def compare(scratch: Path, options: argparse.Namespace) -> None:
    """Run everything below one folder."""
    source = scratch / "hf"
    num_weights = make_checkpoint(source, options.experts)
    peers = {name: run_peer(name, source, scratch) for name in PEERS}
    tool = [sys.executable, str(Path(__file__).parents[1] / "convert_checkpoint.py")]
    rates = [disk_rates(scratch)]
    runs = []
    for number in range(options.repeats):
        target = scratch / f"ours{number}"
        command = ["to-megatron", str(source), str(target), "--workers", str(options.workers)]
        runs.append(measure([*tool, *command], source))
        written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        shutil.rmtree(target)
        rates.append(disk_rates(scratch))
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    reading, writing = (max(column) for column in zip(*rates, strict=True))
    floor = read / reading + written / writing
    ours = min(runs, key=lambda run: run.wall_s)
    report(num_weights, ours, peers, floor, (read, written), (reading, writing))


def run_peer(name: str, source: Path, scratch: Path) -> Run:
    """Run one peer in a process of its own and remove what it wrote."""
    target = scratch / name
    run = measure([sys.executable, __file__, "--peer", name, str(source), str(target)], source)
    shutil.rmtree(target)
    return run


def report(
    num_weights: int, ours: Run, peers: dict[str, Run], floor: float,
    moved: tuple[int, int], rates: tuple[float, float],
) -> None:  # fmt: skip
    """Print the table, K2's extrapolation and the JSON."""
    billions = num_weights / 1e9
    rows = [
        (name, f"{run.wall_s:.2f} s", f"{run.cpu_s:.2f} s", f"{run.cpu_s / billions:.2f}",
         f"{run.rss_anon_bytes / 1e6:.0f} MB", f"{run.wall_s / ours.wall_s:.2f}",
         f"{run.cpu_s / ours.cpu_s:.2f}")
        for name, run in {"k2": ours, **peers}.items()
    ]  # fmt: skip
    header = ("contestant", "wall", "CPU", "CPU s / 1e9 weights", "memory", "wall / k2", "CPU / k2")
    moved_gb = f"{moved[0] / 1e9:.2f} GB FP8 -> {moved[1] / 1e9:.2f} GB"
    print_table(f"{billions:.2f} billion weights, {moved_gb}", header, rows)
    print(
        f"  disk: reads {rates[0] / 1e9:.2f} GB/s, writes {rates[1] / 1e9:.2f} GB/s, floor "
        f"{floor:.2f} s; ours is at {floor / ours.wall_s:.0%} of it"
    )
    disk = K2_READ_BYTES / rates[0] + K2_WRITTEN_BYTES / rates[1]
    wall_s, cpu_s = disk * ours.wall_s / floor, ours.cpu_s / billions * K2_WEIGHTS / 1e9
    print(
        f"  Kimi K2 (1.03 TB -> 2.06 TB) on one such disk at the same share of it: "
        f"{wall_s / 60:.0f} minutes, {cpu_s / 60:.0f} CPU-minutes"
    )
    print_json(
        cpu_s_per_gparam=ours.cpu_s / billions,
        rss_anon_bytes=ours.rss_anon_bytes,
        disk_floor_ratio=floor / ours.wall_s,
        vs_block_loop=peers["block-loop"].wall_s / ours.wall_s,
        vs_torch_dcp=peers["torch-dcp"].wall_s / ours.wall_s,
        cpu_vs_block_loop=peers["block-loop"].cpu_s / ours.cpu_s,
        cpu_vs_torch_dcp=peers["torch-dcp"].cpu_s / ours.cpu_s,
    )


if __name__ == "__main__":
    main()
