"""Loss over FLOPs and sparsity, trained and fitted: `tools/scaling_law.py`."""
