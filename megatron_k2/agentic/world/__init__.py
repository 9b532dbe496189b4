"""Typed worlds, operations on them, faults, and the simulator of tools; see README.md."""
