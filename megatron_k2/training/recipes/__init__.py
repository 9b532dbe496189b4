"""One file for all stages of a training run, and what executes it: `tools/run_recipe.py`."""
