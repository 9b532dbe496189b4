"""Evaluation of a served model: exact answers, tool calls, lm-evaluation-harness."""
