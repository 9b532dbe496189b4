"""Megatron's ``torch_dist`` checkpoints as files: read without torch, written in its frames."""
