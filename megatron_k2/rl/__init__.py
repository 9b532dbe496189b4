"""Reinforcement learning: weights to the engine, rollouts, objective."""
