"""What a process of ``workers.py`` has imported before it is forked: Megatron, silently."""

from megatron_k2.planning.dry_run import load

load()
