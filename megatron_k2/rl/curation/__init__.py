"""Which tasks are worth training on, and in which order they come."""
