"""How a recipe's stages are started: torchrun on this node, torchrun on many, or srun around it.

Every node of a ``torchrun`` launch runs the recipe runner itself (``--nodes``, ``--node-rank``);
under Slurm one runner, on the first node of the allocation, starts each stage as one job step.
Not run by us on more than one node: no cluster.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_k2.training.launch import free_port

KINDS = ("torchrun", "slurm")
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launcher:
    """Where the processes of a stage run.

    Attributes:
        kind: one of ``KINDS``.
        processes: of a node.
        nodes: of the run.
        node_rank: of this runner; under Slurm always 0.
        master: host of node 0; None on a single node.
        port: of the rendezvous on it; a single node takes a free one.
    """

    kind: str
    processes: int
    nodes: int = 1
    node_rank: int = 0
    master: str | None = None
    port: int = DEFAULT_PORT

    def command(self, module: str, arguments: list[str], run_id: str) -> list[str]:
        """Return the program and arguments that run a module on all nodes, or on this one's share.

        Args:
            module: what every process runs.
            arguments: its command line.
            run_id: of the rendezvous; the same on every node.
        """
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nproc-per-node", str(self.processes)]
        place = f"{self.master}:{self.port}"
        if self.kind == "slurm":
            # c10d: Slurm's tasks need no rank of their own; the store lives on the first node.
            torchrun += ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d"]
            torchrun += ["--rdzv-endpoint", place, "--rdzv-id", run_id]
            step = ["srun", "--nodes", str(self.nodes), "--ntasks-per-node", "1"]
            step += ["--kill-on-bad-exit", "1", "--job-name", run_id]
            return [*step, *torchrun, "-m", module, *arguments]
        if self.nodes > 1:
            torchrun += ["--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)]
            torchrun += ["--master-addr", str(self.master), "--master-port", str(self.port)]
        else:
            torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        return [*torchrun, "-m", module, *arguments]


def slurm_launcher(
    processes: int, port: int, environment: Mapping[str, str] | None = None
) -> Launcher:
    """Return the launcher of the Slurm allocation that this process runs in.

    Raises:
        ValueError: there is none.
    """
    environment = os.environ if environment is None else environment
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
    if not nodes:
        raise ValueError("--launcher slurm: not in an allocation (SLURM_JOB_NUM_NODES is not set)")
    # The batch script, and so this process, runs on the first node of the allocation.
    master = environment.get("SLURMD_NODENAME") or socket.gethostname()
    return Launcher("slurm", processes, int(nodes), 0, master, port)
