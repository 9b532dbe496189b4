"""Asks a trained model for facts by cloze prompts, and puts the answers of many runs together."""
