"""Tasks whose answers can be judged, as environments: Kimi K2's Gym (arXiv 2507.20534, 3.2.1)."""
