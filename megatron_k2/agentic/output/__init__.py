"""Output: rows for fine-tuning, tasks for RL, provenance, the report."""
