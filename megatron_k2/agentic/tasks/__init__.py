"""Agents, initial worlds and tasks with rubrics; every task is proven before it is kept."""
