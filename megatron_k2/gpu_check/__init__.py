"""``make gpu-check``: a ladder of checks for whoever has GPUs, and a report that can be sent back.

Three rungs: one GPU, one node of eight, 256 under Slurm. What a rung does is done by code that
trains on a CPU too, and the first two rungs run there in small (``--device cpu``). Nothing here was
run on a GPU by us; README.md says what was.
"""
