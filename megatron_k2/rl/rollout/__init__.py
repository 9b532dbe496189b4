"""Rollouts: episodes of the policy in its environments, scheduled over one engine; see README."""
