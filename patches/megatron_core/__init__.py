"""Patches of Megatron-Core that serve every device."""
