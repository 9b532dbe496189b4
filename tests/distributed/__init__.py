"""Tests that need more than one process: all of them run in one warm pool (``pool.py``)."""
