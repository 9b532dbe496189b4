"""Checkpoints that survive faults: what is whole on disk, and how a save ended."""
