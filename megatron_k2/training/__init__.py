"""Runners: pretraining on Megatron's loop, sampling from a checkpoint, and the main job."""
