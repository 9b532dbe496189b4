"""MuonClip, the optimizer of Kimi K2. So far: the pure parts, which import no Megatron."""
