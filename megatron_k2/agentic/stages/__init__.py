"""The run of a synthesis: stages, their resumption, budgets, progress, Ray."""
