"""Hugging Face folders: safetensors headers, the index, and what config.json says."""
