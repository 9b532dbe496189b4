"""MuonClip, the optimizer of Kimi K2: so far its rule in one process, without Megatron."""
