"""The whole life of a small K2 in one command: a declared list of stages, and what runs it."""
