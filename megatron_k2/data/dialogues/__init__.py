"""Dialogues to packed rows for fine-tuning: ``tools/preprocess_sft.py`` and what training reads."""
