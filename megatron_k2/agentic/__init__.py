"""Agentic data: tools, agents and tasks with rubrics, trajectories, judging; see README.md."""
