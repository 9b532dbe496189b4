"""What of torch, collectives, Megatron, patches and optional packages works when it is tried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_k2 import compat
from megatron_k2.doctor.finding import ABSENT, BROKEN, IDLE, NOTE, OK, Finding, by_this_pip
from megatron_k2.doctor.probe import TRYING

AREA, OPTIONAL_AREA = "torch and Megatron, tried", "optional packages, tried"
DRIVER = Path("/proc/driver/nvidia/version")
_REINSTALL = "--force-reinstall"  # pip leaves a version in range alone, broken or not
ENABLES = {
    "transformer_engine": "fused kernels and FP8 on GPUs",
    "apex": "fused Adam and gradient accumulation on GPUs; never required",
    "emerging_optimizers": "Megatron's own Muon and SOAP",
    "ray": "rephrasing, rollouts and judging on a cluster",
    "openai": "OpenAI's client, which evaluation asks with",
    "lm_eval": "lm-evaluation-harness",
    "gguf": "GGUF files",
    "math_verify": "answers in mathematics",
    "reasoning_gym": "procedural tasks",
    "mcp": "MCP servers as tools",
    "gymnasium": "environments of Gymnasium",
    "checkpoint_engine": "weights to vLLM by broadcast",
    "vllm": "weights to vLLM in its own process",
}


def check_upstream(timeout_s: float) -> list[Finding]:
    """Import, start and patch in two processes side by side; return what came of it.

    Args:
        timeout_s: a process that takes longer is killed, and what it was at is broken.
    """
    running = {part: _start(part) for part in ("torch", "patches")}
    found = {part: _facts(process, timeout_s) for part, process in running.items()}
    facts = found["torch"]
    findings = [*_torch(facts.get("torch", {})), _gloo(facts.get("gloo", {}))]
    findings.append(_patches(found["patches"].get("patches", {})))
    has_gpu = bool(facts.get("torch", {}).get("gpus"))
    return [*findings, *(_package(n, facts.get(n, {}), has_gpu) for n in compat.OPTIONAL)]


def _start(part: str) -> subprocess.Popen[str]:
    """Start a probe that finds packages exactly where this process does."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from megatron_k2.doctor import probe; "
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}probe.main({part!r})"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _facts(process: subprocess.Popen[str], timeout_s: float) -> dict[str, dict[str, Any]]:
    """Return what a probe found by name; what it died of has an ``error``."""
    try:
        text, complaint = process.communicate(timeout=timeout_s)
        how = _end_of(process.returncode, complaint)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        how = f"did not come back in {timeout_s:g} s (a slow machine or disk: --timeout-s)"
    facts: dict[str, dict[str, Any]] = {}
    last = ""
    for line in text.splitlines():
        record = json.loads(line)
        last = record.pop(TRYING, last)
        facts |= record
    if last not in facts:
        facts[last or "torch"] = {"error": how}
    return facts


def _end_of(returncode: int, complaint: str) -> str:
    last = (complaint.strip().splitlines() or ["nothing said"])[-1]
    if returncode < 0:
        return f"the process died of {signal.Signals(-returncode).name}: {last}"
    return f"the process ended with {returncode}: {last}"


def _torch(facts: dict[str, Any]) -> list[Finding]:
    if "version" not in facts:
        cause = facts.get("error", "was not tried")
        mend = by_this_pip(f"{compat.TORCH_INSTALL} {_REINSTALL}")
        return [Finding(AREA, "torch", BROKEN, f"import torch: {cause}", mend)]
    threads = f"{facts['threads']} threads"
    findings = [Finding(AREA, "torch", OK, f"{facts['version']}, {threads}; {facts['host']}")]
    driver = DRIVER.read_text().partition("\n")[0] if DRIVER.is_file() else ""
    if facts["gpus"]:
        said = f"CUDA {facts['cuda']}: {len(facts['gpus'])} x {facts['gpus'][0]}; {driver}"
        findings.append(Finding(AREA, "GPU", OK, said))
    elif driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        said = f"torch (CUDA {facts['cuda']}) sees none, though there is a driver: {driver}"
        mend = "nvidia-smi says what the driver supports; install a newer one, or torch for an "
        findings.append(Finding(AREA, "GPU", BROKEN, said, mend + "older CUDA (pytorch.org)"))
    else:
        findings.append(Finding(AREA, "GPU", IDLE, "none; everything runs on the CPU with gloo"))
    nccl = facts["nccl"]
    said = f"{nccl}" if isinstance(nccl, str) else "in torch, not started: it needs a GPU"
    status = OK if isinstance(nccl, str) else IDLE
    if nccl is False:
        said = "not in this torch; GPUs of several processes need it"
        status = BROKEN if facts["gpus"] else NOTE
    mend = "" if nccl else by_this_pip(f"{compat.TORCH_INSTALL} {_REINSTALL}")
    return [*findings, Finding(AREA, "NCCL", status, said, mend)]


def _gloo(facts: dict[str, Any]) -> Finding:
    if not facts:
        return Finding(AREA, "gloo", NOTE, "not tried: torch does not import")
    if "error" in facts:
        mend = "export GLOO_SOCKET_IFNAME=lo (an interface of `ip link`), or put this host's "
        mend += "name into /etc/hosts"
        return Finding(AREA, "gloo", BROKEN, f"no group of one starts: {facts['error']}", mend)
    return Finding(AREA, "gloo", OK, "a group of one starts")


def _patches(facts: dict[str, Any]) -> Finding:
    if "error" in facts:
        said, _, line = facts["error"].partition("; install: ")  # as compat's refusals end
        mend = by_this_pip(line or compat.MEGATRON_INSTALL)
        return Finding(AREA, "Megatron", BROKEN, said, mend)
    if facts["problems"]:
        said = f"{len(facts['problems'])} of {facts['number']} patches do not fit: "
        said += "; ".join(facts["problems"])
        mend = by_this_pip(f"{compat.MEGATRON_INSTALL} {_REINSTALL} --no-deps")
        return Finding(AREA, "Megatron", BROKEN, said, mend)
    said = f"{facts['version']} in {facts['root']}; all {facts['number']} patches apply"
    return Finding(AREA, "Megatron", OK, said)


def _package(name: str, facts: dict[str, Any], has_gpu: bool) -> Finding:
    need, enables = compat.OPTIONAL[name], ENABLES[name]
    install = by_this_pip(need.install)
    if not facts:
        return Finding(OPTIONAL_AREA, need.distribution, NOTE, f"{enables}; not tried")
    if facts.get("usable"):
        said = f"{facts['version'] or 'found'}: {enables}"
        return Finding(OPTIONAL_AREA, need.distribution, OK, said)
    if facts.get("installed") is False:
        return Finding(OPTIONAL_AREA, need.distribution, ABSENT, enables, install)
    cause = facts.get("error") or facts["cause"]
    if need.needs_gpu and not has_gpu and "error" not in facts:
        said = f"{facts['version']}: {enables}; {cause}"
        return Finding(OPTIONAL_AREA, need.distribution, IDLE, said)
    return Finding(OPTIONAL_AREA, need.distribution, BROKEN, cause, install)
