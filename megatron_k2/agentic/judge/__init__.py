"""Judging: rules, sandbox evidence, model judges, and what the three decide together."""
