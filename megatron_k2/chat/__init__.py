"""Kimi's tokenizer and chat format: text to token ids and back, without torch and Megatron."""
