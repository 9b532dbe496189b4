"""Dialogues of a simulated user, a policy and a toolbox."""
