"""Grids of flags and seeds with the real trainer: `tools/sweep.py`."""
