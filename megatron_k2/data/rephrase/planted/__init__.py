"""A planted test set for the fidelity checks: `python -m megatron_k2.data.rephrase.planted`."""
