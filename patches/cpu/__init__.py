"""Patches that let Megatron train on the host: the CPU device layer."""
